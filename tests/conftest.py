"""What many tests begin with."""
import pytest

from mgprune import load_model


@pytest.fixture(scope="module")
def model():
    "The model that comes with the package, anew for each file"
    return load_model()
