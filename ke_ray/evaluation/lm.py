"""A model in memory as an lm-eval language model that scores shared contexts once.

Tasks, prompts and metrics stay lm-eval's; this class answers its ``loglikelihood`` requests as
``HFLM`` does (same tokenisation of a context and its continuation, same truncation from the left,
same conditioning token for an empty context), item by item, with ``evaluation.spans``: prefixes
that requests share are computed once and the LM head sees target positions only. One departure:
log-softmax is taken in float32 whatever the model's dtype; HFLM takes it in the model's.

lm-eval is imported when a model is wrapped, not before.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from ke_ray.errors import DataError
from ke_ray.evaluation.prefix_tree import Span
from ke_ray.evaluation.sharing import Workers
from ke_ray.evaluation.spans import score_spans

if TYPE_CHECKING:
    from lm_eval.api.model import TemplateLM

_NO_LIMIT = 10**9  # transformers writes 1e30 for "no limit"
_TokenRequest = tuple[tuple[str, str], Sequence[int], Sequence[int]]  # texts, context, target


def as_transformers_tokenizer(tokenizer: Any, model: Any) -> Any:
    """A transformers tokenizer around a ``tokenizers.Tokenizer``; any other is returned as it is.

    The end-of-text token is the one of ``model.config.eos_token_id``.
    """
    if not hasattr(tokenizer, "encode_batch"):
        return tokenizer
    from transformers import PreTrainedTokenizerFast

    eos = getattr(model.config, "eos_token_id", None)
    eos = eos[0] if isinstance(eos, list | tuple) else eos
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=tokenizer.id_to_token(eos) if eos is not None else None,
        clean_up_tokenization_spaces=False,
    )


def wrap_model(
    model: Any,
    tokenizer: Any,
    *,
    batch_tokens: int | None = None,
    workers: Workers | None = None,
) -> TemplateLM:
    """An lm-eval language model for ``lm_eval.evaluate``.

    Args:
        model: a causal language model of transformers.
        tokenizer: of transformers, or a ``tokenizers.Tokenizer``.
        batch_tokens, workers: as ``spans.score_spans``.
    """
    lm: TemplateLM = _language_model_class()(
        model, as_transformers_tokenizer(tokenizer, model), batch_tokens, workers
    )
    return lm


@cache
def _language_model_class() -> type:
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import has_bos_prefix, resolve_max_length

    class InMemoryLM(TemplateLM):
        """Answers log-likelihood requests; generation and rolling likelihood are not offered."""

        def __init__(
            self,
            model: Any,
            tokenizer: Any,
            batch_tokens: int | None,
            workers: Workers | None,
        ) -> None:
            super().__init__()  # for lm-eval it is alone: every worker has all answers
            self.workers = workers
            self.model = model
            self.tokenizer = tokenizer
            self.batch_tokens = batch_tokens
            length = int(resolve_max_length(model.config, tokenizer))
            self.max_length = min(length, _NO_LIMIT)

        @property
        def eot_token_id(self) -> int:
            """End-of-text id of the tokenizer."""
            if self.tokenizer.eos_token_id is None:
                raise DataError("The tokenizer has no end-of-text token; set its eos_token.")
            return int(self.tokenizer.eos_token_id)

        @property
        def prefix_token_id(self) -> int:
            """The context in place of an empty one: the beginning-of-sequence id where there is
            one, else end-of-text."""
            bos = self.tokenizer.bos_token_id
            return int(bos) if bos is not None else self.eot_token_id

        def tok_encode(
            self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
        ) -> list[int]:
            """Ids of one text."""
            return self._encode([string], add_special_tokens)[string]

        def _encode(
            self, texts: Iterable[str], add_special_tokens: bool | None = None
        ) -> dict[str, list[int]]:
            """Ids of each distinct text, tokenised in one batch."""
            unique = list(dict.fromkeys(texts))
            if add_special_tokens is None:
                ids = [self.tokenizer.bos_token_id, self.tokenizer.eos_token_id]
                first = next((token for token in ids if token is not None), None)
                mark = self.tokenizer.decode(first) if first is not None else None
                # A text that starts with the beginning-of-sequence mark gets no second one.
                marked = [text for text in unique if has_bos_prefix(text, mark)]
                result = self._encode(marked, add_special_tokens=False) if marked else {}
                unique = [text for text in unique if text not in result]
                options = {}
            else:
                result, options = {}, {"add_special_tokens": add_special_tokens}
            if unique:
                encoded = self.tokenizer(unique, return_attention_mask=False, **options)
                result.update(zip(unique, encoded["input_ids"], strict=True))
            return result

        def loglikelihood(
            self, requests: list[Any], disable_tqdm: bool = False
        ) -> list[tuple[float, bool]]:
            """(log probability, is greedy) of each request's continuation given its context."""
            pairs: list[tuple[str, str]] = [request.args for request in requests]
            # Blanks that end a context belong to the first word that follows.
            context_ids = self._encode(context.rstrip() for context, _ in pairs if context)
            text_ids = self._encode(context + target for context, target in pairs if context)
            target_ids = self._encode(
                (target for context, target in pairs if not context), add_special_tokens=False
            )
            tokens: list[_TokenRequest] = []
            for context, target in pairs:
                if context:
                    # lm-eval's rule: the context by itself, then the rest of the joint text.
                    ids = context_ids[context.rstrip()]
                    tokens.append(((context, target), ids, text_ids[context + target][len(ids) :]))
                    continue
                ids = target_ids[target]
                size = 1 if ids and ids[0] == self.prefix_token_id else 0
                prefix = ids[:size] or [self.prefix_token_id]
                tokens.append(((context, target), prefix, ids[size:]))
            return self._loglikelihood_tokens(tokens)

        def _loglikelihood_tokens(
            self,
            requests: Sequence[_TokenRequest],
            **kwargs: Any,
        ) -> list[tuple[float, bool]]:
            spans = []
            for (context, continuation), context_ids, target_ids in requests:
                if not target_ids or len(target_ids) > self.max_length:
                    raise DataError(
                        f"The continuation '{continuation[:60]}' of '{context[-60:]}' has "
                        f"{len(target_ids)} tokens; the model takes 1 to {self.max_length}."
                    )
                ids = [*context_ids, *target_ids][-(self.max_length + 1) :]
                size = len(ids) - len(target_ids)
                spans.append(Span(ids[:size], ids[size:]))
            scores = score_spans(
                self.model, spans, batch_tokens=self.batch_tokens, workers=self.workers
            )
            return [
                (float(value), bool(greedy))
                for value, greedy in zip(scores.logprob_summed, scores.is_greedy, strict=True)
            ]

        def loglikelihood_rolling(
            self, requests: list[Any], disable_tqdm: bool = False
        ) -> list[float]:
            raise NotImplementedError("use ke_ray.evaluation.perplexity for running text")

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            raise NotImplementedError("tasks that generate text are not offered; use HFLM")

    return InMemoryLM
