"""secaggexample: A Flower with SecAgg+ app."""

import torch
from sklearn.datasets import load_digits
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Flatten(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10)
        )

    def forward(self, x):
        return self.layers(x)


def make_net(seed=42):
    torch.manual_seed(seed)
    return Net()


def get_weights(net):
    return [val.cpu().numpy() for _, val in net.state_dict().items()]


def set_weights(net, parameters):
    params_dict = zip(net.state_dict().keys(), parameters)
    net.load_state_dict({k: torch.tensor(v) for k, v in params_dict}, strict=True)


def load_data(partition_id, num_partitions):
    """One partition's training data, and the test data that all share."""
    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    y = torch.tensor(digits.target)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(1))
    x, y = x[order], y[order]
    train = (x[:1400][partition_id::num_partitions], y[:1400][partition_id::num_partitions])
    return train, (x[1400:], y[1400:])


def train(net, data, epochs, lr):
    x, y = data
    optimizer = torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9)
    criterion = nn.CrossEntropyLoss()
    net.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(y)).split(16):
            optimizer.zero_grad()
            criterion(net(x[batch]), y[batch]).backward()
            optimizer.step()


def test(net, data):
    x, y = data
    net.eval()
    with torch.no_grad():
        outputs = net(x)
    loss = nn.CrossEntropyLoss()(outputs, y).item()
    return loss, (outputs.argmax(1) == y).float().mean().item()
