"""secaggexample: A Flower with SecAgg+ app."""

from flwr.common import Context, ndarrays_to_parameters
from flwr.server import LegacyContext, ServerConfig
from flwr.server.strategy import Krum
from flwr.server.workflow import DefaultWorkflow, SecAggPlusWorkflow
from flwr.serverapp import Grid, ServerApp

from secaggexample.task import get_weights, make_net

app = ServerApp()


def weighted_average(metrics):
    examples = [num_examples for num_examples, _ in metrics]
    accuracies = [num_examples * m["accuracy"] for num_examples, m in metrics]
    return {"accuracy": sum(accuracies) / sum(examples)}


@app.main()
def main(grid: Grid, context: Context) -> None:
    # Krum tolerates malicious clients, SecAgg+ keeps the updates private
    strategy = Krum(
        num_malicious_clients=context.run_config["num-malicious"],
        min_available_clients=5,
        fraction_evaluate=0.3,
        evaluate_metrics_aggregation_fn=weighted_average,
        initial_parameters=ndarrays_to_parameters(get_weights(make_net())),
    )

    # Construct the LegacyContext
    context = LegacyContext(
        context=context,
        config=ServerConfig(num_rounds=context.run_config["num-server-rounds"]),
        strategy=strategy,
    )

    # Create fit workflow with SecAgg+
    fit_workflow = SecAggPlusWorkflow(
        num_shares=context.run_config["num-shares"],
        reconstruction_threshold=context.run_config["reconstruction-threshold"],
        max_weight=context.run_config["max-weight"],
    )

    # Execute
    DefaultWorkflow(fit_workflow=fit_workflow)(grid, context)
