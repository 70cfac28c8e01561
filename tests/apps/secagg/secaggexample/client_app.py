"""secaggexample: A Flower with SecAgg+ app."""

from flwr.client import NumPyClient
from flwr.client.mod import secaggplus_mod
from flwr.clientapp import ClientApp
from flwr.common import Context

from secaggexample.task import get_weights, load_data, make_net, set_weights, test, train


class FlowerClient(NumPyClient):
    def __init__(self, trainset, testset, local_epochs, learning_rate):
        self.net = make_net()
        self.trainset, self.testset = trainset, testset
        self.local_epochs = local_epochs
        self.lr = learning_rate

    def fit(self, parameters, config):
        set_weights(self.net, parameters)
        train(self.net, self.trainset, self.local_epochs, self.lr)
        return get_weights(self.net), len(self.trainset[1]), {}

    def evaluate(self, parameters, config):
        set_weights(self.net, parameters)
        loss, accuracy = test(self.net, self.testset)
        return loss, len(self.testset[1]), {"accuracy": accuracy}


def client_fn(context: Context):
    trainset, testset = load_data(
        context.node_config["partition-id"], context.node_config["num-partitions"]
    )
    return FlowerClient(
        trainset,
        testset,
        context.run_config["local-epochs"],
        context.run_config["learning-rate"],
    ).to_client()


app = ClientApp(client_fn=client_fn, mods=[secaggplus_mod])
