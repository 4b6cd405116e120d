"""BentoML: a service whose method takes an image, as its examples have it, in as many threads as there are cores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bentoml
from PIL import Image

from benchmarks.peers.workload import Recogniser, as_pixels, decoder, job

_JOB = job()


@bentoml.service(workers=1, threads=_JOB["cores"], traffic={"timeout": 60}, metrics={"enabled": False})
class Recognise:
    def __init__(self) -> None:
        self._decode = decoder(_JOB)
        self._recogniser = Recogniser(_JOB)

    @bentoml.api
    def predict(self, image: Image.Image) -> dict[str, Any]:
        return self._recogniser.recognise([as_pixels(image, _JOB["preprocessing"])])[0]

    @bentoml.api
    def predict_file(self, image: Path) -> dict[str, Any]:
        """For our decoder, which takes the file."""
        return self._recogniser.recognise([self._decode(image.read_bytes())])[0]
