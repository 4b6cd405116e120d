"""AutoVER's inference with transformers: retrieve names, build a prefix tree of the nearest, decode within it.

`faithful` follows the authors' code: one pass over image and prompt for the retrieval embedding, a tree of the nearest
names, then `generate` with two beams, which passes over image and prompt again. `optimised` is as fast as possible
without changing what an answer means: it decodes from the first pass's keys and values with one beam, tokenises the
names in advance, and stops as soon as one name is left in the tree.

Shapes: L prompt tokens, T decoded tokens, N entities, R retrieval width, V vocabulary, C width of the states.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from benchmarks.generative.models import clip_preprocessing
from core.arrays import Pixels
from imaging import Preprocessing, normalise

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration

END, IMAGE, RETRIEVE, START = "</s>", "<image>", "<retrieve>", "<s>"
PROMPT = "What is the name of the entity in this image?"
TOKENS = 8000  # of the trained vocabulary
NAMES_IN_TREE = 300  # as in the paper; the authors' code has 100
BEAMS = 2


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The entity row, the time per stage and, with generation, the number of decoded tokens."""

    row: int
    stages_ms: dict[str, float]
    tokens: int | None = None


class GenerativeRecognizer:
    """A model with the catalog that it answers from: names and their retrieval embeddings `[N, R]`."""

    def __init__(
        self,
        model: LlavaForConditionalGeneration,
        retrieval_head: torch.nn.Linear,
        tokenizer: Tokenizer,
        names: Sequence[str],
        name_embeddings_NR: torch.Tensor,
        *,
        names_in_tree: int = NAMES_IN_TREE,
        preprocessing: Preprocessing | None = None,
        question: str = PROMPT,
    ) -> None:
        self._model: Any = model
        self._head = retrieval_head
        self._tokenizer = tokenizer
        self._names = names
        self._embeddings_NR = name_embeddings_NR
        self._names_in_tree = min(names_in_tree, len(names))
        self._end = token_id(tokenizer, END)
        self.prompt_1L = prompt(tokenizer, model.config.image_seq_length, question).to(name_embeddings_NR.device)
        self.preprocessing = preprocessing or clip_preprocessing(model.config.vision_config.image_size)
        self._tokens = [np.array(each.ids, np.int32) for each in tokenizer.encode_batch(list(names))]

    def quantise(self) -> None:
        """Switch the linear layers to dynamic int8 (torch's own kernels)."""
        with warnings.catch_warnings():
            # Deprecated in favour of torchao, whose kernels need a compiler.
            warnings.simplefilter("ignore", DeprecationWarning)
            warnings.filterwarnings("ignore", message="torch.quantize_per_tensor")
            from torch.ao.quantization import per_channel_dynamic_qconfig, quantize_dynamic

            layers = {torch.nn.Linear: per_channel_dynamic_qconfig}
            self._model = quantize_dynamic(self._model, layers)  # type: ignore[no-untyped-call]

    @torch.inference_mode()
    def faithful(self, pixels_HW3: Pixels) -> Answer:
        """Answer one preprocessed image."""
        clock = Clock(self._embeddings_NR.device)
        nearest, _ = self._retrieve(pixels_HW3, clock, use_cache=False)
        tree = AllowedNames(
            (each.ids for each in self._tokenizer.encode_batch([self._names[i] for i in nearest])), self._end
        )
        clock.lap("tree")
        length = self.prompt_1L.shape[1]
        (sequence_T,) = self._model.generate(
            input_ids=self.prompt_1L, attention_mask=torch.ones_like(self.prompt_1L),
            pixel_values=self._pixel_values(pixels_HW3), num_beams=BEAMS, do_sample=False,
            prefix_allowed_tokens_fn=lambda _, tokens_T: tree.allowed(tokens_T[length:].tolist()),
            max_new_tokens=1 + max(len(self._tokens[row]) for row in nearest),
            eos_token_id=self._end, pad_token_id=self._end,
        )  # fmt: skip
        clock.lap("prefill again and decode")
        decoded = sequence_T[length:].tolist()
        return Answer(row=nearest[tree.name(decoded)], tokens=decoded.index(self._end) + 1, stages_ms=clock.stages_ms)

    @torch.inference_mode()
    def optimised(self, pixels_HW3: Pixels) -> Answer:
        """Answer one preprocessed image."""
        clock = Clock(self._embeddings_NR.device)
        nearest, outputs = self._retrieve(pixels_HW3, clock, use_cache=True)
        tree = AllowedNames((self._tokens[row].tolist() for row in nearest), self._end)
        clock.lap("tree")
        decoded: list[int] = []
        while (found := tree.completed(decoded)) is None:
            if decoded:
                outputs = self._model.model(
                    input_ids=self.prompt_1L.new_tensor([decoded[-1:]]), past_key_values=outputs.past_key_values,
                    use_cache=True,
                )  # fmt: skip
            choice = tree.allowed(decoded)
            logits_V = self._model.lm_head(outputs.last_hidden_state[:, -1])[0]
            decoded.append(choice[int(logits_V[choice].argmax())])
        clock.lap("decode")
        return Answer(row=nearest[found], tokens=len(decoded), stages_ms=clock.stages_ms)

    def _retrieve(self, pixels_HW3: Pixels, clock: Clock, *, use_cache: bool) -> tuple[list[int], Any]:
        """Pass over image and prompt. Return the rows of the nearest names, best first, and the model's outputs."""
        features = self._model.get_image_features(pixel_values=self._pixel_values(pixels_HW3))
        clock.lap("image tower")
        outputs = self._model.model(
            input_ids=self.prompt_1L, mm_encoder_outputs={"image": features}, use_cache=use_cache
        )
        clock.lap("prefill")
        query_1R = F.normalize(self._head(outputs.last_hidden_state[:, -1]), dim=1)
        nearest = (query_1R @ self._embeddings_NR.T)[0].topk(self._names_in_tree).indices.tolist()
        clock.lap("retrieve")
        return nearest, outputs

    def _pixel_values(self, pixels_HW3: Pixels) -> torch.Tensor:
        embeddings = self._embeddings_NR
        return torch.from_numpy(normalise(pixels_HW3[None], self.preprocessing)).to(embeddings.device, embeddings.dtype)


def prompt(tokenizer: Tokenizer, image_tokens: int, question: str = PROMPT) -> torch.Tensor:
    """Return token ids `[1, L]`: start, image positions, question, and the token whose state is the retrieval query."""
    image, start, retrieve = (token_id(tokenizer, token) for token in (IMAGE, START, RETRIEVE))
    return torch.tensor([[start, *[image] * image_tokens, *tokenizer.encode(question).ids, retrieve]])


class Clock:
    """Stage times. On a GPU, a lap waits for the queued work."""

    def __init__(self, device: torch.device) -> None:
        self._wait: Callable[[], None] = torch.cuda.synchronize if device.type == "cuda" else lambda: None
        self.stages_ms: dict[str, float] = {}
        self._wait()
        self._lap_at = time.perf_counter()

    def lap(self, stage: str) -> None:
        self._wait()
        started, self._lap_at = self._lap_at, time.perf_counter()
        self.stages_ms[stage] = 1000 * (self._lap_at - started)


def train_tokenizer(names: Iterable[str], tokens: int = TOKENS) -> Tokenizer:
    """Train byte-level BPE (Sennrich et al., 2016) on the names. It can encode any name."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=tokens,
        special_tokens=[START, END, IMAGE, RETRIEVE],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*names, PROMPT], trainer)
    return tokenizer


def token_id(tokenizer: Tokenizer, token: str) -> int:
    found = tokenizer.token_to_id(token)
    assert found is not None, "the tokenizer was trained with it"
    return found


class AllowedNames:
    """The names that decoding may spell, each ended with the token `end`. Of equal names, the first counts.

    A few hundred names are searched one by one, which takes far less time than a pass through the model.
    """

    def __init__(self, names: Iterable[Sequence[int]], end: int) -> None:
        self._end = end
        self._positions: dict[tuple[int, ...], int] = {}
        for position, tokens in enumerate(names):
            self._positions.setdefault((*tokens, end), position)

    def allowed(self, prefix: Sequence[int]) -> list[int]:
        """Return the tokens that may follow: after a whole name or an unknown prefix, only `end`.

        Beam search asks this also for beams that are finished or have probability zero.
        """
        return list({name[len(prefix)] for name in self._with(prefix) if len(name) > len(prefix)}) or [self._end]

    def completed(self, prefix: Sequence[int]) -> int | None:
        """Return the position of the only name with this prefix, None if there are several."""
        names = self._with(prefix)
        return self._positions[names[0]] if len(names) == 1 else None

    def name(self, tokens: Sequence[int]) -> int:
        """Return the position of the name that the tokens spell, up to the first `end`. Raise `KeyError` if none."""
        return self._positions[tuple(tokens[: tokens.index(self._end) + 1])]

    def _with(self, prefix: Sequence[int]) -> list[tuple[int, ...]]:
        return [name for name in self._positions if name[: len(prefix)] == tuple(prefix)]
