"""BentoML: a service whose method takes an image, as in its examples, with one thread per core."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bentoml
from PIL import Image

from benchmarks.peers import Recognizer, make_decoder, preprocess, read_job

JOB = read_job()


@bentoml.service(workers=1, threads=JOB["cores"], traffic={"timeout": 60}, metrics={"enabled": False})
class Recognize:
    def __init__(self) -> None:
        self._decode = make_decoder(JOB)
        self._recognizer = Recognizer(JOB)

    @bentoml.api
    def predict(self, image: Image.Image) -> dict[str, Any]:
        return self._recognizer.recognize([preprocess(image, JOB["preprocessing"])])[0]

    @bentoml.api
    def predict_file(self, image: Path) -> dict[str, Any]:
        """Decode the file with our decoder."""
        return self._recognizer.recognize([self._decode(image.read_bytes())])[0]
