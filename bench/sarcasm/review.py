"""What the review reports of its own run, from its log; validation there is the test split here."""

from typing import NamedTuple

# Per cent, epochs 1 to 30.
TEST_ACCURACY = (
    70.48, 77.44, 79.43, 79.52, 81.77, 81.77, 82.22, 82.59, 82.22, 81.77,
    82.16, 82.95, 82.83, 83.06, 83.02, 82.87, 83.13, 82.87, 82.98, 82.97,
    83.04, 83.10, 83.08, 83.25, 82.80, 83.17, 82.85, 83.13, 83.23, 82.55,
)  # fmt: skip
EPOCHS = len(TEST_ACCURACY)
# In the review's unit, by epoch: those it prints, and the lowest of its log.
TEST_LOSS = {13: 0.0119, 15: 0.0118, 24: 0.0128, 30: 0.0142}


class Figures(NamedTuple):
    """One line of the review's tables; losses in its unit, accuracies in per cent, as it prints them."""

    what: str
    epoch: str
    train_loss: str
    train_accuracy: str
    test_loss: str
    test_accuracy: str


LOWEST_LOSS = Figures("lowest test loss", "13 (printed), 15 (log)", "0.0099", "86.13", "0.0119; 0.0118 (log)", "82.83")
BEST = Figures("best test accuracy", "24", "0.0084", "87.94", "0.0128", "83.25")
LAST = Figures("last epoch", "30", "0.0077", "88.95", "0.0142", "82.55")
