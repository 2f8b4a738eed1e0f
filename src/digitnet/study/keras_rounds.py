"""The write-up's model in Keras, trained a round at a time for ``digitnet benchmark`` to set its clock by.

A script of its own: Keras and TensorFlow may live in another environment, which need not have digitnet. Each line on
standard input asks for one round, each line on standard output answers with its seconds, as JSON.

    python keras_rounds.py DATA.npz BATCH_SIZE VAL_BATCH_SIZE

DATA.npz holds the images and labels of a round: train_images, train_labels, val_images, val_labels.
"""

from __future__ import annotations

import json
import os
import sys
import time

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

import keras
import numpy as np
from keras import layers

CONV = {"padding": "same", "activation": "relu", "kernel_initializer": "he_normal"}
DENSE = {"activation": "relu", "kernel_initializer": "he_normal"}


def build_model() -> keras.Model:
    """The notebook's final model, compiled as there."""
    model = keras.Sequential(
        [
            keras.Input((28, 28, 1)),
            layers.RandomRotation(0.05, fill_mode="nearest"),
            layers.RandomTranslation(0.1, 0.1, fill_mode="nearest"),
            layers.Conv2D(64, 7, **CONV), layers.MaxPooling2D(2),
            layers.Conv2D(128, 3, **CONV), layers.Conv2D(128, 3, **CONV), layers.MaxPooling2D(2),
            layers.Conv2D(256, 3, **CONV), layers.Conv2D(256, 3, **CONV), layers.MaxPooling2D(2),
            layers.Flatten(),
            layers.Dense(128, **DENSE), layers.Dropout(0.2),
            layers.Dense(64, **DENSE), layers.Dropout(0.2),
            layers.Dense(10, activation="softmax"),
        ]
    )  # fmt: skip
    assert model.count_params() == 1_413_834
    model.compile(optimizer="adam", loss="sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


def main(path: str, batch_size: str, val_batch_size: str) -> None:
    """Train one round for each line that comes in."""
    data = np.load(path)
    train, val = (data[f"{part}_images"][..., None].astype("float32") / 255 for part in ("train", "val"))
    model = build_model()
    versions = {"keras": keras.__version__, "backend": keras.backend.backend()}
    for _ in sys.stdin:
        start = time.perf_counter()
        model.fit(
            train,
            data["train_labels"],
            batch_size=int(batch_size),
            validation_data=(val, data["val_labels"]),
            validation_batch_size=int(val_batch_size),
            verbose=0,
        )
        print(json.dumps({"seconds": time.perf_counter() - start, "versions": versions}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
