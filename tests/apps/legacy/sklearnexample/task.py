"""sklearnexample: A Flower / sklearn app."""

import numpy as np
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression


def load_data(partition_id: int, num_partitions: int):
    """Load the digits of one partition."""
    X, y = load_digits(return_X_y=True)
    order = np.random.RandomState(7).permutation(len(y))
    X, y = X[order] / 16.0, y[order]
    X, y = X[partition_id::num_partitions], y[partition_id::num_partitions]
    cut = int(0.8 * len(X))
    return X[:cut], X[cut:], y[:cut], y[cut:]


def get_model(penalty: str, local_epochs: int):
    return LogisticRegression(C=10.0, max_iter=local_epochs, warm_start=True)


def get_model_params(model):
    return [model.coef_, model.intercept_]


def set_model_params(model, params):
    model.coef_ = params[0].copy()
    model.intercept_ = params[1].copy()
    return model


def set_initial_params(model):
    model.classes_ = np.arange(10)
    model.coef_ = np.zeros((10, 64))
    model.intercept_ = np.zeros((10,))
