"""What others have published of MNIST, which ours stands beside."""

from __future__ import annotations

# Position among the 10,000 classic test images -> what people see (None: no digit), where the label says otherwise.
# Source: human raters of Northcutt et al. 2021, "Pervasive Label Errors in Test Sets Destabilize Machine Learning
# Benchmarks" (cleanlab).
KNOWN_WRONG = {
    947: 9, 1621: 6, 1901: 4, 2462: 0, 2597: 3, 3558: 0, 5937: 3, 6651: 6, 6783: 6, 9729: 6,
    2654: None, 3520: None, 9679: None,
}  # fmt: skip
CLASSIC_TEST_START = 60_000  # where they begin in mnist_784

# Network, distortions, error in % on the 10,000, source. Source: LeCun, Cortes and Burges, "The MNIST database".
LECUN_TABLE = [
    ("LeNet-1", "none", "1.7", "LeCun et al. 1998"),
    ("LeNet-4", "none", "1.1", "LeCun et al. 1998"),
    ("LeNet-4 with K-NN instead of last layer", "none", "1.1", "LeCun et al. 1998"),
    ("LeNet-4 with local learning instead of last layer", "none", "1.1", "LeCun et al. 1998"),
    ("LeNet-5", "none", "0.95", "LeCun et al. 1998"),
    ("LeNet-5", "huge", "0.85", "LeCun et al. 1998"),
    ("LeNet-5", "yes", "0.8", "LeCun et al. 1998"),
    ("Boosted LeNet-4", "yes", "0.7", "LeCun et al. 1998"),
    ("Trainable feature extractor + SVMs", "none", "0.83", "Lauer et al. 2007"),
    ("Trainable feature extractor + SVMs", "elastic", "0.56", "Lauer et al. 2007"),
    ("Trainable feature extractor + SVMs", "affine", "0.54", "Lauer et al. 2007"),
    ("Unsupervised sparse features + SVM", "none", "0.59", "Labusch et al. 2008"),
    ("Convolutional net, cross-entropy", "affine", "0.6", "Simard et al. 2003"),
    ("Convolutional net, cross-entropy", "elastic", "0.4", "Simard et al. 2003"),
    ("Large conv. net, random features", "none", "0.89", "Ranzato et al. 2007"),
    ("Large conv. net, unsupervised features", "none", "0.62", "Ranzato et al. 2007"),
    ("Large conv. net, unsupervised pretraining", "none", "0.60", "Ranzato et al. 2006"),
    ("Large conv. net, unsupervised pretraining", "elastic", "0.39", "Ranzato et al. 2006"),
    ("Large conv. net, unsupervised pretraining", "none", "0.53", "Jarrett et al. 2009"),
    ("Large/deep conv. net, 1-20-40-60-80-100-120-120-10", "elastic", "0.35", "Ciresan et al. 2011"),
    ("Committee of 7 conv. nets", "elastic", "0.27 ± 0.02", "Ciresan et al. 2011"),
    ("Committee of 35 conv. nets", "elastic", "0.23", "Ciresan et al. 2012"),
]
WRITEUP_ERRORS = 22  # of the last 5,000
