"""Presses of the kvpress library as functions: what they need of a layer is made here, as every family has it.

kvpress hooks a few text models by class and reads their attention modules. Here a stand-in takes the module's place: its
projections give what really enters attention, with norms behind them and the family's own factor of the logits; its rotary
module gives the family's positions. kvpress and its dependencies are imported when a recipe names a press.
"""

from __future__ import annotations

import ast
import difflib
import inspect
import threading
from collections.abc import Callable, Sequence
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from foveate.core.errors import FoveateError
from foveate.core.signal import Scorer
from foveate.models import decoder
from foveate.models.anatomy import Anatomy

REFUSED = {
    "BasePress": "has no scores of its own; name one of its kinds",
    "ScorerPress": "has no scores of its own; name one of its kinds",
    "CAMPress": "acts in steps of decoding, here on prompts only; use KeyDiffPress",
    "ComposedPress": "is several presses, each on what the one before left; use one of them",
    "CompressionRatioDecodingPress": "acts in steps of decoding, here on prompts only; use the press inside it",
    "DMSPress": "drops what scores below a threshold, so that keep would say nothing; use the press inside it",
    "DecodingPress": "acts in steps of decoding, here on prompts only; use the press inside it",
    "DuoAttentionPress": "chooses heads by patterns of text models, so that keep would say nothing; use AdaKVPress",
    "FastKVzipPress": "compares all layers by gates that were trained for text models; use AdaKVPress",
    "FinchPress": "needs a delimiter in the prompt, which a processor does not put there; use SnapKVPress",
    "KVComposePress": "runs the text model a second time on ids that it is handed; use SnapKVPress",
    "KVgradPress": "runs the text model a second time on ids that it is handed; use SnapKVPress",
    "KVzipPress": "runs the text model a second time on ids that it is handed; use SnapKVPress",
    "KeyRerotationPress": "turns keys to other positions, where entries keep theirs; use the press inside it",
    "MergingPress": "writes other values, where entries keep theirs; use the press inside it",
    "ObservedAttentionPress": "sums whole attention maps, which are never made; use SnapKVPress",
    "PerLayerCompressionPress": "has a ratio for each layer, so that keep would say nothing; use the press inside it",
    "PrefillDecodingPress": "acts in steps of decoding, here on prompts only; use the press for prompts inside it",
    "PyramidKVPress": "has a budget for each layer; use the method pyramidkv, whose budgets are these",
    "RestoreKVPress": "runs the text model a second time on ids that it is handed; use SnapKVPress",
    "SimLayerKVPress": "keeps by a threshold on each layer, so that keep would say nothing; use StreamingLLMPress",
    "ThinKPress": "zeroes parts of keys and removes no entry; use SnapKVPress",
}
"""Presses that do not choose the entries of a prompt by a budget, and what to do instead."""

TRIAL = 128
"""Random rows that a press is tried on when it is attached."""

_LOCK = threading.RLock()
"""Presses hold their ratio, and torch one generator for all, so that one prompt is scored at a time."""


def library() -> Any:
    """kvpress.

    Raises:
        FoveateError: if it, or what it needs, is not installed.
    """
    try:
        import kvpress
    # It may want another transformers than the one that is here, and find out in any way.
    except Exception as error:
        raise FoveateError(
            f"needs kvpress, which cannot be imported ({_line(error)}); pip install 'foveate[kvpress]', then pip install "
            "--no-deps kvpress"
        ) from error
    return kvpress


def build(text: str) -> Any:
    """The press that ``text`` writes down, as Python does: ``"AdaKVPress(SnapKVPress(window_size=16))"``.

    Raises:
        FoveateError: if it is no such press, or one that cannot run here.
    """
    try:
        made = _made(ast.parse(text, mode="eval").body, library())
        if isinstance(made, library().BasePress):
            return made
        raise SyntaxError
    except SyntaxError as error:
        raise FoveateError(f"press={text!r}: must be a press, such as 'SnapKVPress(window_size=16)'") from error
    except FoveateError as error:
        raise FoveateError(f"press={text!r}: {error}") from error


def _made(node: ast.expr, kvpress: Any) -> Any:
    name = node.func if isinstance(node, ast.Call) else node
    if not isinstance(name, ast.Name):
        try:
            return ast.literal_eval(node)
        except ValueError as error:
            raise FoveateError("options must be numbers, text, true or false, None, or a press") from error
    known = presses()
    if name.id not in known:
        close = difflib.get_close_matches(name.id, known, n=1)
        raise FoveateError(
            f"kvpress has no {name.id!r}; " + (f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}")
        )
    if name.id in REFUSED:
        raise FoveateError(f"{name.id} {REFUSED[name.id]}")
    call = node if isinstance(node, ast.Call) else ast.Call(func=name, args=[], keywords=[])
    try:
        args = [_made(one, kvpress) for one in call.args]
        return getattr(kvpress, name.id)(*args, **{str(one.arg): _made(one.value, kvpress) for one in call.keywords})
    except (AssertionError, TypeError, ValueError) as error:
        raise FoveateError(f"{name.id}: {_line(error)}") from error


def presses() -> list[str]:
    """Names of the presses that the installed kvpress has."""
    kvpress = library()
    found = ((name, getattr(kvpress, name)) for name in kvpress.__all__)
    return sorted(name for name, kind in found if inspect.isclass(kind) and issubclass(kind, kvpress.BasePress))


class Pressing:
    """A press on one model."""

    def __init__(self, anatomy: Anatomy, text: str) -> None:
        self.anatomy, self.text, self.press = anatomy, text, build(text)
        config = SimpleNamespace(
            **{**anatomy.config.to_dict(), "name_or_path": str(getattr(anatomy.model, "name_or_path", ""))}
        )
        try:  # presses with numbers of their own look for those of the checkpoint
            self.press.post_init_from_model(SimpleNamespace(config=config, device=anatomy.home, dtype=anatomy.dtype))
        except Exception as error:
            raise FoveateError(f"press={text!r}: there are no numbers of it for this checkpoint ({_line(error)})") from error

    def on(self, layer: int) -> Callable[..., Tensor]:
        """What `foveate.core.signal.Scorer` promises, on a decoder layer."""
        return lambda *rows: self._scores(layer, *rows)

    def check(self, layer: int) -> None:
        """Try it on a few random rows: what it asks for is there.

        Raises:
            FoveateError: if it is not, with the reason.
        """
        anatomy, device = self.anatomy, self.anatomy.device(layer) or self.anatomy.home
        native = 3 if anatomy.rotary_rows > 1 else 1
        x = 0.02 * torch.randn(1, TRIAL, anatomy.config.hidden_size, generator=torch.Generator().manual_seed(0))
        x, positions = x.to(device, anatomy.dtype), torch.arange(TRIAL, device=device).expand(native, 1, -1)
        with torch.no_grad():
            keys, values = anatomy.keys_values(layer, x, anatomy.rotary(layer, x, positions))
        try:
            self._run(layer, x, positions, keys, values, TRIAL // 2, None, trial=True)
        except FoveateError as error:
            raise FoveateError(f"press={self.text!r}: {error}") from error
        except (AssertionError, ValueError):
            return  # some want more rows than these; prompts that have too few are refused as they come
        except Exception as error:
            raise FoveateError(
                f"press={self.text!r}: fails on {anatomy.family} ({type(error).__name__}: {_line(error)}); use KeyDiffPress"
            ) from error

    def _scores(self, layer: int, *given: Any) -> Tensor:
        try:
            return self._run(layer, *given)
        except FoveateError:
            raise
        except (AssertionError, ValueError) as error:
            raise FoveateError(
                f"press={self.text!r}: {given[0].shape[1]} tokens: {_line(error)}; give it options for short prompts"
            ) from error

    @torch.no_grad()
    def _run(
        self,
        layer: int,
        x: Tensor,
        positions: Tensor,
        keys: Tensor,
        values: Tensor,
        drop: int,
        spared: Tensor | None = None,
        trial: bool = False,
    ) -> Tensor:
        module = _Attention(self.anatomy, layer, positions, keys, trial)
        hidden, tables = self.anatomy.norm(layer)(x), _Tables(module, x)
        with _LOCK, torch.random.fork_rng([keys.device] if keys.is_cuda else []):
            torch.default_generator.manual_seed(layer)
            if keys.is_cuda:
                torch.cuda.default_generators[keys.device.index].manual_seed(layer)
            # Short of the share by less than any entry, so that no rounding costs one.
            self.press.compression_ratio = max(drop - 1e-6, 0) / x.shape[1]
            if isinstance(self.press, library().ScorerPress):
                scores = self.press.score(module, hidden, keys, values, None, tables).float()
                wide = torch.finfo(scores.dtype)
                return scores.nan_to_num(nan=wide.max, posinf=wide.max, neginf=wide.min)
            return self._chosen(module, hidden, keys, values, tables, spared)

    def _chosen(
        self, module: Any, hidden: Tensor, keys: Tensor, values: Tensor, tables: Any, spared: Tensor | None
    ) -> Tensor:
        """0 for the entries that a press chooses by itself, -inf for others."""
        inner, noted = self.press.press, keys.as_subclass(_Noted)
        if spared is not None:
            own = inner.score
            inner.score = lambda *args: own(*args).masked_fill(spared[:, None], float("inf"))
        try:
            self.press.compress(module, hidden, noted, values, None, tables)
        finally:
            vars(inner).pop("score", None)
        if module.masked_key_indices is not None:
            sample, head, entry = module.masked_key_indices
            scores = torch.zeros(keys.shape[:3], device=keys.device)
            scores[sample.to(keys.device), head, entry] = float("-inf")
            return scores
        if noted.taken is None:
            raise FoveateError("says in no known way which entries it keeps; use the press inside it")
        scores = torch.full(keys.shape[:3], float("-inf"), device=keys.device)
        return scores.scatter(2, noted.taken[..., 0], 0.0)


def check_presses(signals: Sequence[Scorer], parts: Anatomy) -> None:
    """Presses can be built, and work on each kind of layer."""
    for text in dict.fromkeys(signal.press for signal in signals):
        pressing = Pressing(parts, text)
        layers = [signal.layer for signal in signals if signal.press == text and signal.layer not in parts.recurrent]
        for layer in {id(parts.build(layer)): layer for layer in reversed(layers)}.values():
            pressing.check(layer)


class _Attention:
    """Stands in for the attention module of a decoder layer; on ``trial`` it proves what it else takes for granted."""

    def __init__(self, anatomy: Anatomy, layer: int, positions: Tensor, keys: Tensor, trial: bool = False) -> None:
        self.anatomy, self.layer_idx, self.positions, self.trial = anatomy, layer, positions, trial
        self.attention, self.head_dim = anatomy.attention(layer), keys.shape[-1]
        self.num_key_value_groups = anatomy.config.num_attention_heads // keys.shape[1]
        self.masked_key_indices: tuple[Tensor, Tensor, Tensor] | None = None
        self.config = SimpleNamespace(
            num_attention_heads=anatomy.config.num_attention_heads,
            num_key_value_heads=keys.shape[1],
            num_hidden_layers=len(anatomy.layers),
            head_dim=self.head_dim,
            hidden_size=anatomy.config.hidden_size,
            _attn_implementation="sdpa",  # whatever it is, there are no maps
        )

    def q_proj(self, hidden: Tensor) -> Tensor:
        """``[B, n, H * d]`` queries that enter attention, not turned yet, as if logits were divided by the root of d."""
        query = self._made("q", hidden)
        factor = self.anatomy.build(self.layer_idx).scale * query.shape[-1] ** 0.5
        return (query if abs(factor - 1) < 1e-6 else query * factor).transpose(1, 2).flatten(2)

    def k_proj(self, hidden: Tensor) -> Tensor:
        """``[B, n, Hkv * d]`` keys, not turned yet."""
        return self._made("k", hidden).transpose(1, 2).flatten(2)

    @cached_property
    def o_proj(self) -> nn.Module:
        """What mixes the heads, with a weight that can be read."""
        found = self.anatomy.output(self.layer_idx)
        weight = getattr(found, "weight", None)
        if not isinstance(weight, nn.Parameter) or not weight.is_floating_point():
            raise FoveateError("its output projection has no weight that could be read; use the press inside it")
        return found

    def rotary_emb(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Tables ``[1, m, d]`` of ``position_ids`` ``[1, m]``, which count rows: the first one behind them all is next."""
        ahead = position_ids.to(x.device) - self.positions.shape[-1] + 1 + self.positions.amax((0, 2))[:, None]
        return self.tables(x, ahead.expand(self.positions.shape[0], -1, -1))

    def tables(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines ``[B, n, d]`` of ``positions`` ``[R, B, n]`` that turn number i of a head with number i + d / 2.

        Raises:
            FoveateError: if the family turns otherwise.
        """
        half, rope = self.head_dim // 2, self.anatomy.rotary(self.layer_idx, x, positions)
        probe = torch.zeros(positions.shape[1], 2, positions.shape[2], self.head_dim, device=x.device, dtype=x.dtype)
        probe[:, 0, :, :half] = 1
        probe[:, 1, :, half:] = 1
        one, other = self.anatomy.rotate(self.layer_idx, probe, probe, rope)[0].unbind(1)
        cos = torch.cat([one[..., :half], other[..., half:]], dim=-1)
        sin = torch.cat([-other[..., :half], one[..., half:]], dim=-1)
        if self.trial:
            rows = torch.randn_like(probe)
            turned = self.anatomy.rotate(self.layer_idx, rows, rows, rope)[0]
            swapped = torch.cat([-rows[..., half:], rows[..., :half]], dim=-1)
            if not torch.allclose(turned, rows * cos[:, None] + swapped * sin[:, None], rtol=2e-2, atol=2e-2):
                raise FoveateError(
                    f"turns queries, for which {self.anatomy.family} pairs other numbers than kvpress; use KeyDiffPress"
                )
        return cos, sin

    def _made(self, name: str, hidden: Tensor) -> Tensor:
        if self.anatomy.build(self.layer_idx).projected:
            return decoder.project(self.attention, name, hidden)
        still = torch.zeros(
            3 if self.anatomy.rotary_rows > 1 else 1, *hidden.shape[:2], dtype=torch.long, device=hidden.device
        )
        cos, sin = self.anatomy.rotary(self.layer_idx, hidden, still)
        made = decoder.ask(self.attention, hidden, (torch.ones_like(cos), torch.zeros_like(sin)))
        return made.query if name == "q" else made.key


class _Tables(dict[str, Any]):
    """The keyword arguments of attention that presses read, made when they do."""

    def __init__(self, module: _Attention, x: Tensor) -> None:
        super().__init__()
        self._module, self._x = module, x

    def __missing__(self, name: str) -> Any:
        if name != "position_embeddings":
            raise FoveateError(f"reads {name} of the model's call, which is not handed on; use KeyDiffPress")
        return self._module.tables(self._x, self._module.positions)


class _Noted(Tensor):
    """Keys that remember which entries were taken of them last."""

    taken: Tensor | None = None

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if func is Tensor.gather:
                args[0].taken = args[2]
            return func(*args, **(kwargs or {}))


def _line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
