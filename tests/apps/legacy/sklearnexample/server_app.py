"""sklearnexample: A Flower / sklearn app."""

from flwr.common import Context, ndarrays_to_parameters
from flwr.server import ServerAppComponents, ServerConfig
from flwr.server.strategy import FedAvg
from flwr.serverapp import ServerApp

from sklearnexample.task import get_model, get_model_params, set_initial_params


def weighted_average(metrics):
    """Average the clients' accuracies, weighted by their numbers of examples."""
    accuracies = [num_examples * m["test_acc"] for num_examples, m in metrics]
    examples = [num_examples for num_examples, _ in metrics]
    return {"test_acc": sum(accuracies) / sum(examples)}


def server_fn(context: Context):
    num_rounds = context.run_config["num-server-rounds"]
    model = get_model(context.run_config["model.penalty"], context.run_config["model.local-epochs"])
    set_initial_params(model)
    strategy = FedAvg(
        min_available_clients=2,
        initial_parameters=ndarrays_to_parameters(get_model_params(model)),
        evaluate_metrics_aggregation_fn=weighted_average,
    )
    return ServerAppComponents(strategy=strategy, config=ServerConfig(num_rounds=num_rounds))


app = ServerApp(server_fn=server_fn)
