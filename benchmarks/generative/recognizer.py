"""AutoVER's inference on transformers: a retrieval embedding, a prefix tree of the nearest names, decoding within it.

`faithful` does what the authors' code does: one pass over image and prompt for the retrieval embedding, a tree built
from the nearest names, then `generate` with two beams, which passes over image and prompt again, once for each beam.
`optimised` does what one can without changing an answer's meaning: the first pass's keys and values are decoded from,
with one beam; names are tokenised beforehand; decoding ends as soon as one name is left in the tree.

Shapes: B images, L prompt tokens, N entities, R retrieval width, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer

from benchmarks.generative.names import END, IMAGE, PROMPT, RETRIEVE, START
from benchmarks.generative.prefix_tree import PrefixTree
from imaging import Preprocessing, normalise

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration

NAMES_IN_TREE = 300  # the paper's; its code has 100
BEAMS = 2


def clip_preprocessing(size_px: int) -> Preprocessing:
    """CLIP's, as LLaVA takes it."""
    return Preprocessing(
        size_px=size_px, resize="shortest", crop="center", interpolation="bicubic",
        mean=(0.48145466, 0.4578275, 0.40821073), std=(0.26862954, 0.26130258, 0.27577711),
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Generated:
    """The entity row of each image, the tokens decoded for each, and where the time went."""

    rows: list[int]
    tokens: list[int]
    stages_ms: dict[str, float]


class GenerativeRecognizer:
    """A model, and the catalog it may answer from: the names and their retrieval embeddings `[N, R]`."""

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
        self._in_tree = min(names_in_tree, len(names))
        end = tokenizer.token_to_id(END)
        assert end is not None, "the tokenizer was trained with it"
        self._end = end
        self.prompt_1L = prompt(tokenizer, model.config.image_seq_length, question).to(name_embeddings_NR.device)
        self.preprocessing = preprocessing or clip_preprocessing(model.config.vision_config.image_size)
        # Tokenised once, for `optimised`: ragged, so one flat array and where each name ends.
        tokens = [each.ids for each in tokenizer.encode_batch(list(names))]
        self._tokens = np.fromiter((token for each in tokens for token in each), np.int32)
        self._token_ends = np.cumsum([len(each) for each in tokens])

    @torch.inference_mode()
    def faithful(self, pixels_HW3: npt.NDArray[np.uint8]) -> Generated:
        """One image, uint8 `[H, W, 3]` as preprocessed."""
        clock = _Clock(self._embeddings_NR.device)
        pixel_values = self._pixel_values(pixels_HW3[None])
        features = self._model.get_image_features(pixel_values=pixel_values)
        clock.lap("image tower")
        outputs = self._model.model(input_ids=self.prompt_1L, mm_encoder_outputs={"image": features}, use_cache=False)
        state_BC = outputs.last_hidden_state[:, -1]
        clock.lap("prefill")
        nearest = self._nearest(state_BC)[0]
        clock.lap("retrieve")
        tree = PrefixTree(
            (each.ids for each in self._tokenizer.encode_batch([self._names[i] for i in nearest])), self._end
        )
        clock.lap("tree")
        prefilled_ms: list[float] = []

        def allowed(_: int, tokens_T: torch.Tensor) -> list[int]:
            if not prefilled_ms:  # the first question comes when prompt and image have been passed over
                prefilled_ms.append(clock.since_lap_ms())
            return tree.allowed(tokens_T[self.prompt_1L.shape[1] :].tolist())

        (sequence_T,) = self._model.generate(
            input_ids=self.prompt_1L, attention_mask=torch.ones_like(self.prompt_1L), pixel_values=pixel_values,
            num_beams=BEAMS, do_sample=False, prefix_allowed_tokens_fn=allowed,
            max_new_tokens=1 + int(max(np.diff(self._token_ends, prepend=0)[nearest])),
            eos_token_id=self._end, pad_token_id=self._end,
        )  # fmt: skip
        decoded = sequence_T[self.prompt_1L.shape[1] :].tolist()
        clock.lap("decode")
        clock.split("decode", "prefill again", prefilled_ms[0])
        length = decoded.index(self._end) + 1
        return Generated(rows=[nearest[tree.name(decoded)]], tokens=[length], stages_ms=clock.stages_ms)

    @torch.inference_mode()
    def optimised(self, pixels_BHW3: npt.NDArray[np.uint8]) -> Generated:
        """A batch, uint8 `[B, H, W, 3]` as preprocessed: prompts are equally long, so nothing is padded."""
        clock = _Clock(self._embeddings_NR.device)
        features = self._model.get_image_features(pixel_values=self._pixel_values(pixels_BHW3))
        clock.lap("image tower")
        prompt_BL = self.prompt_1L.expand(len(pixels_BHW3), -1)
        outputs = self._model.model(input_ids=prompt_BL, mm_encoder_outputs={"image": features}, use_cache=True)
        state_BC = outputs.last_hidden_state[:, -1]
        clock.lap("prefill")
        nearest = self._nearest(state_BC)
        clock.lap("retrieve")
        trees = [PrefixTree(map(self._tokens_of, rows), self._end) for rows in nearest]
        clock.lap("tree")
        decoded: list[list[int]] = [[] for _ in trees]
        while True:
            logits_BV = self._model.lm_head(state_BC)
            for tree, prefix, logits_V in zip(trees, decoded, logits_BV, strict=True):
                if not _spelled(tree, prefix, self._end):
                    choice = tree.allowed(prefix)
                    prefix.append(choice[int(logits_V[choice].argmax())])
            if all(_spelled(tree, prefix, self._end) for tree, prefix in zip(trees, decoded, strict=True)):
                break
            last_B1 = torch.tensor([[prefix[-1]] if prefix else [self._end] for prefix in decoded]).to(logits_BV.device)
            outputs = self._model.model(input_ids=last_B1, past_key_values=outputs.past_key_values, use_cache=True)
            state_BC = outputs.last_hidden_state[:, -1]
        clock.lap("decode")
        found = [_name(tree, prefix, self._end) for tree, prefix in zip(trees, decoded, strict=True)]
        rows = [near[position] for near, position in zip(nearest, found, strict=True)]
        return Generated(rows=rows, tokens=[len(prefix) for prefix in decoded], stages_ms=clock.stages_ms)

    def _pixel_values(self, pixels_BHW3: npt.NDArray[np.uint8]) -> torch.Tensor:
        embeddings = self._embeddings_NR
        return torch.from_numpy(normalise(pixels_BHW3, self.preprocessing)).to(embeddings.device, embeddings.dtype)

    def _nearest(self, state_BC: torch.Tensor) -> list[list[int]]:
        """The rows of the nearest names, best first."""
        queries_BR = F.normalize(self._head(state_BC), dim=1)
        rows: list[list[int]] = (queries_BR @ self._embeddings_NR.T).topk(self._in_tree, dim=1).indices.tolist()
        return rows

    def _tokens_of(self, row: int) -> list[int]:
        start = self._token_ends[row - 1] if row else 0
        tokens: list[int] = self._tokens[start : self._token_ends[row]].tolist()
        return tokens


def prompt(tokenizer: Tokenizer, image_tokens: int, question: str = PROMPT) -> torch.Tensor:
    """Token ids `[1, L]`: start, the places of the image, the question, the token whose state is what retrieves."""
    image, start, retrieve = (tokenizer.token_to_id(token) for token in (IMAGE, START, RETRIEVE))
    return torch.tensor([[start, *[image] * image_tokens, *tokenizer.encode(question).ids, retrieve]])


def quantise(module: torch.nn.Module) -> torch.nn.Module:
    """The linear layers in int8, dynamically (torch's own kernels): u8 activations, s8 weights."""
    import warnings

    with warnings.catch_warnings():
        # It has moved to torchao, whose kernels need a compiler.
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.filterwarnings("ignore", message="torch.quantize_per_tensor")
        from torch.ao.quantization import per_channel_dynamic_qconfig, quantize_dynamic

        layers = {torch.nn.Linear: per_channel_dynamic_qconfig}
        quantised: torch.nn.Module = quantize_dynamic(module, layers)  # type: ignore[no-untyped-call]
    return quantised


def _spelled(tree: PrefixTree, prefix: Sequence[int], end: int) -> bool:
    return prefix[-1:] == [end] or tree.only_name(prefix) is not None


def _name(tree: PrefixTree, prefix: Sequence[int], end: int) -> int:
    if prefix[-1:] == [end]:
        return tree.name(prefix)
    position = tree.only_name(prefix)
    assert position is not None
    return position


class _Clock:
    """Stage times; on a GPU a lap ends when the work that was queued has."""

    def __init__(self, device: torch.device) -> None:
        self._wait: Callable[[], None] = torch.cuda.synchronize if device.type == "cuda" else lambda: None
        self.stages_ms: dict[str, float] = {}
        self._wait()
        self._lap_at = time.perf_counter()

    def since_lap_ms(self) -> float:
        self._wait()
        return 1000 * (time.perf_counter() - self._lap_at)

    def lap(self, stage: str) -> None:
        self.stages_ms[stage] = self.since_lap_ms()
        self._lap_at = time.perf_counter()

    def split(self, stage: str, first: str, first_ms: float) -> None:
        """Take `first` out of a stage that it was the beginning of."""
        whole_ms = self.stages_ms.pop(stage)
        self.stages_ms |= {first: first_ms, stage: whole_ms - first_ms}
