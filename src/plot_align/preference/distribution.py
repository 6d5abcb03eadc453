"""Token counts over chosen and rejected completions, and target distributions computed from them.

``d = Q⁺/ΣQ⁺ − Q⁻/ΣQ⁻`` is how much more often a token occurs in preferred answers than in rejected ones. Counts are
integers, so two estimates merge exactly, by addition.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from plot_align.errors import InputError
from plot_align.io import complete_or_absent, fits, parse_json
from plot_align.preference.target import TRANSFORMS, anchored, counted

SCHEMA = 1
FORMAT = "plot-align preference"


@dataclass(frozen=True, eq=False, repr=False)
class PreferenceDistribution:
    """Counts of completion tokens in chosen and in rejected answers, over one tokenizer's vocabulary of V ids.

    Attributes:
        chosen_counts: Q⁺, int64, shape (V,): how often chosen completions train each token.
        rejected_counts: Q⁻, int64, shape (V,): the same for rejected completions.
        provenance: JSON-able. ``tokenizer``: ``fingerprint`` (:func:`vocabulary_fingerprint`) and ``size``.
            ``policy``: the settings that decide which tokens are counted (``template`` hash, ``eos``, ``max_length``,
            ``truncation_mode``). ``sources``: one entry for each data set counted: its ``id``, ``split``,
            ``revision`` and ``fingerprint`` (None if a trainer tokenised it), the ``tokenizer`` it was read with,
            ``rows``, ``dropped_rows``, ``tokens`` and package ``versions``.

    Raises:
        InputError: the counts are not two int64 vectors of the same length, or one of them is negative.
    """

    chosen_counts: Tensor
    rejected_counts: Tensor
    provenance: dict[str, Any]

    def __post_init__(self) -> None:
        for name in ("chosen_counts", "rejected_counts"):
            counts = getattr(self, name)
            if counts.dtype != torch.int64 or counts.ndim != 1 or counts.shape != self.chosen_counts.shape:
                raise InputError(
                    f"{name} is a {counts.dtype} tensor of shape {tuple(counts.shape)}, expected int64 of shape "
                    f"({len(self.chosen_counts) if self.chosen_counts.ndim else 'V'},) like chosen_counts; "
                    "pass one count per token id"
                )
            if counts.numel() == 0 or bool((counts < 0).any()):
                raise InputError(f"{name} is empty or has a negative entry, expected how often each token was seen")
            if float(counts.double().sum()) > 2**53:  # sums in int64 would overflow, frequencies lose single tokens
                raise InputError(
                    f"{name} has more than 2^53 tokens, expected the counts of a data set; count it again"
                )

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, PreferenceDistribution)
            and torch.equal(self.chosen_counts, other.chosen_counts)
            and torch.equal(self.rejected_counts, other.rejected_counts)
            and self.provenance == other.provenance
        )

    def __repr__(self) -> str:
        return (
            f"PreferenceDistribution({self.vocab_size} ids, {int(self.chosen_counts.sum())} chosen and "
            f"{int(self.rejected_counts.sum())} rejected tokens of {self.rows} rows)"
        )

    @property
    def vocab_size(self) -> int:
        """V, the number of token ids counted over (the largest id of the tokenizer, plus one)."""
        return len(self.chosen_counts)

    @property
    def sources(self) -> list[dict[str, Any]]:
        """One entry for each data set counted."""
        return list(self.provenance.get("sources", []))

    @property
    def rows(self) -> int:
        """Rows counted, without those that the trainer's length filter drops."""
        return sum(source["rows"] for source in self.sources)

    def difference(self, size: int | None = None) -> Tensor:
        """``d = Q⁺/ΣQ⁺ − Q⁻/ΣQ⁻``, float64, shape (size or V,), sums to zero; rows from V on are 0.

        Raises:
            InputError: no token was counted on one side, or ``size`` is smaller than V.
        """
        chosen, rejected = self._frequencies()
        return self._padded(chosen - rejected, size)  # (size,)

    def preferred(self, size: int | None = None) -> Tensor:
        """Mask of the tokens with d > 0, bool, shape (size or V,); rows from V on are False.

        Raises:
            InputError: no token was counted on one side, or ``size`` is smaller than V.
        """
        return self._padded(self.difference() > 0, size)

    def rejected(self, size: int | None = None) -> Tensor:
        """Mask of the tokens with d < 0, bool, shape (size or V,); rows from V on are False.

        Raises:
            InputError: no token was counted on one side, or ``size`` is smaller than V.
        """
        return self._padded(self.difference() < 0, size)

    def standard_error(self) -> Tensor:
        """Standard error of d, float64, shape (V,): ``sqrt(q⁺(1 − q⁺)/ΣQ⁺ + q⁻(1 − q⁻)/ΣQ⁻)``.

        Tokens count as independent draws. Within one answer they are not, so the true error is somewhat larger.

        Raises:
            InputError: no token was counted on one side.
        """
        chosen, rejected = self._frequencies()
        return (
            chosen * (1 - chosen) / self.chosen_counts.sum() + rejected * (1 - rejected) / self.rejected_counts.sum()
        ).sqrt()  # (V,)

    def confidence(self) -> Tensor:
        """z-score of d for each token, float64, shape (V,), zero for tokens never seen.

        The two-proportion z test with the pooled frequency ``q = (Q⁺ + Q⁻)/(ΣQ⁺ + ΣQ⁻)``:
        ``z = d / sqrt(q(1 − q)(1/ΣQ⁺ + 1/ΣQ⁻))``. Its square is Pearson's χ² of the token's 2×2 table. As in
        :meth:`standard_error`, tokens count as independent draws; read z as a ranking rather than as a test.

        Raises:
            InputError: no token was counted on one side.
        """
        difference = self.difference()
        chosen, rejected = self.chosen_counts.sum().double(), self.rejected_counts.sum().double()
        pooled = (self.chosen_counts + self.rejected_counts).double() / (chosen + rejected)  # (V,)
        error = (pooled * (1 - pooled) * (1 / chosen + 1 / rejected)).sqrt()  # (V,)
        return torch.where(error > 0, difference / error, torch.zeros_like(error))

    def target(
        self,
        transform: str = "relu",
        *,
        temperature: float = 1.0,
        strength: float = 1.0,
        reference: Tensor | None = None,
        size: int | None = None,
    ) -> Tensor:
        """Target distribution ``P = φ(d)/Σφ(d)``, float64, shape (size or V,); rows from V on have no mass.

        Args:
            transform: φ.

                - ``"relu"``: ``max(d, 0)``, the preferred tokens (our reading of the paper).
                - ``"shift"``: ``d − min d``. Every unseen token gets ``−min d``, so with a large vocabulary this is
                  almost uniform.
                - ``"softmax"``: ``exp(d / (temperature · max|d| / ln V))``. In this unit the scale of d, which
                  shrinks as data and vocabulary grow, drops out: at temperature 1 a token with ``d = max|d|`` weighs
                  as much as V neutral tokens together, above 1 the target becomes flatter and below 1 sharper.
                - ``"chosen"``: Q⁺, the preferred answers' own token frequencies.
                - ``"anchored"``: ``max(p_ref + strength · d, 0)``, the reference model's own distribution, shifted
                  by the preferences.
            temperature: temperature of ``softmax``, > 0.
            strength: λ of ``anchored``, ≥ 0.
            reference: p_ref of ``anchored``, shape (V,) or (size,): the reference model's mean output distribution.
            size: number of rows of the model's head, at least V. None: V.

        Raises:
            InputError: d is zero everywhere or a side is empty (no target exists), an unknown transform, a
                temperature, strength or reference out of range, or ``size`` smaller than V.
        """
        if transform not in TRANSFORMS:
            raise InputError(f"transform is {transform!r}, expected one of {', '.join(TRANSFORMS)}")
        chosen, rejected = self._frequencies()  # (V,), (V,)
        require_preference(chosen - rejected)
        if transform == "anchored":
            weights = anchored(self._anchor(reference, size), chosen - rejected, strength)  # (V,)
        else:
            weights = counted(transform, chosen, rejected, temperature=temperature)  # (V,)
        return self._padded(weights / weights.sum(), size)  # (size,)

    def merge(self, other: PreferenceDistribution) -> PreferenceDistribution:
        """Adds the counts, as if both data sets had been counted as one. Associative and commutative.

        Raises:
            InputError: the two come from different vocabularies, or were counted under different policies.
        """
        mine, theirs = self.provenance.get("tokenizer", {}), other.provenance.get("tokenizer", {})
        if mine.get("fingerprint") != theirs.get("fingerprint") or self.vocab_size != other.vocab_size:
            raise InputError(
                f"merge: one preference was counted with tokenizer {self._tokenizer_name()}, the other with "
                f"{other._tokenizer_name()}; estimate both with the same tokenizer"
            )
        if self.provenance.get("policy") != other.provenance.get("policy"):
            raise InputError(
                f"merge: one preference was counted under {_canonical(self.provenance.get('policy'))}, the other "
                f"under {_canonical(other.provenance.get('policy'))}; estimate both with the same settings"
            )
        return PreferenceDistribution(
            self.chosen_counts + other.chosen_counts,
            self.rejected_counts + other.rejected_counts,
            {**self.provenance, "sources": sorted(self.sources + other.sources, key=_canonical)},
        )

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write one safetensors file: both counts, and the provenance as JSON in its metadata. Returns the path.

        The file is never partial; the same counts and provenance give the same bytes.

        Raises:
            InputError: ``path`` does not end in ``.safetensors`` or cannot be written.
        """
        from safetensors.torch import save

        path = Path(path)
        if path.suffix != ".safetensors":
            raise InputError(f"path is {str(path)!r}, expected a file name ending in .safetensors; rename it")
        metadata = {
            "format": FORMAT,
            "schema": str(SCHEMA),
            "digest": self._digest(),
            "provenance": json.dumps(self.provenance, sort_keys=True),
        }
        tensors = {"chosen_counts": self.chosen_counts, "rejected_counts": self.rejected_counts}
        with complete_or_absent(path) as temporary:
            content = save({name: counts.contiguous() for name, counts in tensors.items()}, metadata)
            temporary.write_bytes(_with_sorted_header(content))
        return path

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> PreferenceDistribution:
        """Read a file written by :meth:`save`, onto the CPU.

        Raises:
            InputError: a file that is missing, truncated, damaged, no preference distribution, or written by another
                version of this package.
        """
        from safetensors import SafetensorError, safe_open

        if not Path(path).is_file():
            raise InputError(f"preference file {path} does not exist; make one with `plot-align estimate`")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                known = set(file.keys()) == {"chosen_counts", "rejected_counts"}  # else it may be larger than memory
                tensors = {name: file.get_tensor(name).clone() for name in file.keys() if known}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise InputError(
                f"preference file {path} is no complete safetensors file ({_one_line(error)}), so it is truncated or "
                "damaged; copy or estimate it again"
            ) from None
        if metadata.get("format") != FORMAT or not known:
            raise InputError(
                f"{path} is a safetensors file but no preference distribution; name a file that "
                "`plot-align estimate` wrote"
            )
        if metadata.get("schema") != str(SCHEMA):
            raise InputError(
                f"preference file {path} has schema {metadata.get('schema')}, and this version reads schema {SCHEMA}; "
                "install the plot-align that wrote it, or estimate it again"
            )
        damaged = InputError(f"preference file {path} is damaged: its content does not match; estimate it again")
        try:
            provenance = _provenance(metadata["provenance"])
            preference = cls(tensors["chosen_counts"], tensors["rejected_counts"], provenance)
            digest = preference._digest()
        except (KeyError, ValueError):
            raise damaged from None
        if digest != metadata.get("digest"):
            raise damaged
        return preference

    def check_tokenizer(self, tokenizer: Any) -> None:
        """Refuse a tokenizer whose vocabulary differs from the one counted with.

        Raises:
            InputError: naming both tokenizers.
        """
        expected = self.provenance.get("tokenizer", {}).get("fingerprint")
        found = vocabulary_fingerprint(tokenizer)
        if found != expected:
            raise InputError(
                f"tokenizer is {_named(tokenizer_name(tokenizer), found)}, but the preference distribution was "
                f"counted with {self._tokenizer_name()}; estimate it again with the tokenizer you train with"
            )

    def check_head(self, rows: int) -> None:
        """Refuse a head with fewer rows than the vocabulary. More rows are padding, and get no target mass.

        Raises:
            InputError: ``rows`` is smaller than V.
        """
        if rows < self.vocab_size:
            raise InputError(
                f"the model's head has {rows} rows, but the preference distribution covers {self.vocab_size} token "
                "ids; resize the model's embeddings to the tokenizer, or estimate with the model's own tokenizer"
            )

    def _frequencies(self) -> tuple[Tensor, Tensor]:
        """Q⁺/ΣQ⁺ and Q⁻/ΣQ⁻, float64, shape (V,) each."""
        for side, counts in (("chosen", self.chosen_counts), ("rejected", self.rejected_counts)):
            if not counts.any():
                raise InputError(
                    f"the preference distribution has no {side} token, expected completions on both sides; "
                    "check max_length and the data set"
                )
        return (
            self.chosen_counts.double() / self.chosen_counts.sum(),
            self.rejected_counts.double() / self.rejected_counts.sum(),
        )

    def _anchor(self, reference: Tensor | None, size: int | None) -> Tensor:
        """p_ref over the V token ids, float64."""
        if reference is None:
            raise InputError(
                "reference is missing: the anchored target needs the reference model's mean output distribution; "
                "pass reference=, or choose another transform"
            )
        if reference.ndim != 1 or len(reference) not in {self.vocab_size, size or self.vocab_size}:
            raise InputError(
                f"reference has shape {tuple(reference.shape)}, expected one probability for each of the "
                f"{size or self.vocab_size} rows of the head"
            )
        anchor = reference.detach().to("cpu", torch.float64)
        total = float(anchor.sum())
        # 1e-3 leaves room for a mean taken in bf16; a logit vector or a sum of several distributions is far off.
        if not bool(torch.isfinite(anchor).all()) or float(anchor.min()) < 0 or abs(total - 1) > 1e-3:
            raise InputError(
                f"reference has entries from {float(anchor.min()):.3g} and sums to {total:.6g}, expected a "
                "probability distribution; pass the softmax, averaged over the positions"
            )
        anchor = anchor[: self.vocab_size]  # drop the mass of padding rows
        if float(anchor.sum()) == 0:
            raise InputError("reference puts no mass on the tokenizer's ids, expected the model's output distribution")
        return anchor / anchor.sum()

    def _padded(self, values: Tensor, size: int | None) -> Tensor:
        """``values`` (V,) padded with zeros (False) to ``size`` rows."""
        if size is None:
            return values
        self.check_head(size)
        padded = values.new_zeros(size)
        padded[: self.vocab_size] = values
        return padded

    def _digest(self) -> str:
        """Digest of the counts and the provenance, because safetensors has no checksum."""
        digest = hashlib.sha256(_canonical(self.provenance).encode())
        for counts in (self.chosen_counts, self.rejected_counts):
            digest.update(counts.cpu().numpy().astype("<i8").tobytes())
        return digest.hexdigest()

    def _tokenizer_name(self) -> str:
        names = sorted({str(source.get("tokenizer")) for source in self.sources})
        fingerprint = self.provenance.get("tokenizer", {}).get("fingerprint")
        return _named(" / ".join(names) or "of unknown name", fingerprint)


def _provenance(text: str) -> dict[str, Any]:
    """The provenance in a file. Raises ValueError if it has another form than ``estimate`` gives it."""
    found = parse_json(text)
    json.dumps(found, allow_nan=False)  # whoever shows it as JSON must be able to
    if not fits(found, dict[str, Any]) or not fits(found.get("sources", []), list[dict[str, Any]]):
        raise ValueError("no mapping, or its sources are none")
    if not fits(found.get("tokenizer", {}), dict[str, Any]):
        raise ValueError("tokenizer is no mapping")
    if not fits(found.get("tokenizer", {}).get("fingerprint"), str | None):
        raise ValueError("tokenizer.fingerprint is no text")
    for source in found.get("sources", []):
        if not all(fits(n, int) and 0 <= n < 2**53 for n in (source["rows"], source.get("dropped_rows", 0))):
            raise ValueError("a source has no number of rows")
    return found


def _with_sorted_header(content: bytes) -> bytes:
    """Sorts the JSON header of a safetensors file: the library writes metadata in random order."""
    size = int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8 : 8 + size]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # tensors begin at a multiple of eight
    return len(header).to_bytes(8, "little") + header + content[8 + size :]


def require_preference(difference: Tensor) -> None:
    """Refuse d = 0 everywhere.

    Raises:
        InputError: every entry of ``difference`` (V,) is zero.
    """
    if not difference.any():
        raise InputError(
            "the preference distribution has d = 0 for every token (chosen and rejected use the same tokens equally "
            "often), so no target exists; check that chosen and rejected differ"
        )


def vocabulary_fingerprint(tokenizer: Any) -> str:
    """SHA-256 of the vocabulary with added tokens: equal if and only if every token has the same id."""
    entries = sorted((index, token) for token, index in tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps(entries).encode()).hexdigest()


def vocabulary_size(tokenizer: Any) -> int:
    """Largest token id plus one, including added tokens; more than ``len(tokenizer)`` if ids have gaps."""
    return max(tokenizer.get_vocab().values()) + 1


def tokenizer_name(tokenizer: Any) -> str:
    """The name of a tokenizer in messages: its hub id, the last part of its folder, or else its class."""
    name = str(getattr(tokenizer, "name_or_path", "") or "")
    if os.path.isabs(name) or Path(name).exists():
        name = Path(name).name  # do not leak a local path into a file that others get
    return name or type(tokenizer).__name__


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _named(name: str, fingerprint: str | None) -> str:
    return f"{name} (vocabulary {fingerprint[:12] if fingerprint else 'unknown'})"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
