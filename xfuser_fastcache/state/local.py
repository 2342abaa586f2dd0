"""What one rank remembers of its own tensors, for which branch and patch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

from xfuser_fastcache.consensus.topology import Position
from xfuser_fastcache.measurements.moments import Reference
from xfuser_fastcache.models.forward_layout import latents_known
from xfuser_fastcache.models.streams import Streams, cut

# Stands for the patch's index where a forward pass carries all tokens.
WHOLE = -1


@dataclass(frozen=True)
class Anchor:
    """A span at a step at which it was really computed.

    Where a token plan left tokens out of that step, these are as they were last computed.

    Attributes:
        noise_level: sigma of that step.
        inputs: what entered the span, `(batch, tokens, dim)` a stream; at a pipeline's last stage
            the latents, without any tokens where they are not known.
        residual: what left the span minus what entered it, same shapes; of a whole forward pass,
            what it put out.
        reference: the image tokens of `inputs` with their energies, for the next measurement; None
            where neither a gate nor a token plan rests on them.
        levels: sigma at which each image token was computed, float32 `(batch, tokens, 1)`; None
            where it is `noise_level` for all.
    """

    noise_level: float
    inputs: Streams
    residual: Streams
    reference: Reference | None
    levels: torch.Tensor | None = None

    def split(self, lengths: tuple[int, ...]) -> list[Anchor]:
        """Cut the anchor along the image tokens into patches of the given lengths."""
        parts = list(zip(self.inputs.split(lengths), self.residual.split(lengths), strict=True))
        references: list[Reference | None] = [None] * len(parts)
        if self.reference is not None:
            energies = cut(self.reference.energy, lengths)
            references = [
                Reference(inputs.hidden_states, energy)
                for (inputs, _), energy in zip(parts, energies, strict=True)
            ]
        return [
            Anchor(self.noise_level, inputs, residual, reference)
            for (inputs, residual), reference in zip(parts, references, strict=True)
        ]

    def nbytes(self) -> int:
        """Bytes held."""
        held = self.inputs.nbytes() + self.residual.nbytes()
        if self.reference is not None:
            held += self.reference.energy.nbytes
        return held


@dataclass(frozen=True)
class Memory:
    """What is remembered of one span, for one branch and patch.

    Attributes:
        anchors: newest first, as many as the forecaster looks back.
        slope: what the forecaster has fitted to computed steps, a tensor a stream: of `linear` a
            slope a channel, `(dim,)`, of `dmd` factors an item, `(batch, modes)`; else None.
        missed: what the forecast of the newest anchor's step would have been wrong by; None where
            nobody asks for it.
        output_unknown: whether the span's output was not seen at the step at which it was last
            computed; there are no anchors then.
    """

    anchors: tuple[Anchor, ...] = ()
    slope: Streams | None = None
    missed: Streams | None = None
    output_unknown: bool = False

    def split(self, lengths: tuple[int, ...]) -> list[Memory]:
        """Cut the memory of all tokens into the memories of consecutive patches."""
        cut = [anchor.split(lengths) for anchor in self.anchors]
        missed = [None] * len(lengths) if self.missed is None else self.missed.split(lengths)
        return [
            replace(self, anchors=tuple(parts[patch] for parts in cut), missed=missed[patch])
            for patch in range(len(lengths))
        ]

    def nbytes(self) -> int:
        """Bytes held."""
        held = sum(anchor.nbytes() for anchor in self.anchors)
        return held + sum(x.nbytes() for x in (self.slope, self.missed) if x is not None)


@dataclass
class LocalState:
    """What this rank alone holds of one CFG branch of the current generation.

    Attributes:
        pending: moments measured since the last post, int64 `(groups, SLOTS)`, and below them the
            slots of token counts, a row of edges a rank (see `count_groups`), or the moments of an
            audit.
        memories: span -> patch (`WHOLE` for all tokens) -> what the forecaster remembers.
        references: group -> patch -> what it is measured against, where no anchor holds that.
        seen: group -> what was measured of it in this forward pass.
    """

    pending: torch.Tensor
    memories: dict[int, dict[int, Memory]] = field(default_factory=dict)
    references: dict[int, dict[int, Reference]] = field(default_factory=dict)
    seen: dict[int, torch.Tensor] = field(default_factory=dict)

    def memory(self, span: int, position: Position) -> Memory:
        """Return what is remembered of a span for the tokens of `position`.

        What was remembered of all tokens in PipeFusion's synchronous steps is cut into patches at
        the first patched step.
        """
        patches = self.memories.setdefault(span, {})
        if position.patched and WHOLE in patches:
            whole = patches.pop(WHOLE)
            patches.update(enumerate(whole.split(position.patch_tokens)))
        return patches.get(patch_of(position), Memory())

    def remember(self, span: int, position: Position, memory: Memory) -> None:
        """Replace what is remembered of a span for the tokens of `position`."""
        self.memories[span][patch_of(position)] = memory

    def complete(self, position: Position, latents: Callable[[torch.Tensor], Streams]) -> None:
        """Give the newest anchors of the tokens of `position` their latents, where these were not
        known as the forward pass began.

        Args:
            position: of the forward pass that has ended.
            latents: in the batch of a tensor.
        """
        for patches in self.memories.values():
            memory = patches.get(patch_of(position), Memory())
            if memory.anchors and not latents_known(memory.anchors[0].inputs):
                newest, *others = memory.anchors
                known = replace(newest, inputs=latents(newest.inputs.hidden_states))
                patches[patch_of(position)] = replace(memory, anchors=(known, *others))

    def forget(self, position: Position) -> None:
        """Forget all spans' memories of the tokens of `position`."""
        for patches in self.memories.values():
            patches.pop(patch_of(position), None)

    def reference(self, group: int, position: Position) -> Reference | None:
        """Return what a group is measured against for the tokens of `position`, cut as memories."""
        patches = self.references.setdefault(group, {})
        if position.patched and WHOLE in patches:
            whole, lengths = patches.pop(WHOLE), position.patch_tokens
            parts = zip(cut(whole.hidden_states, lengths), cut(whole.energy, lengths), strict=True)
            patches.update((i, Reference(*part, whole.norm)) for i, part in enumerate(parts))
        return patches.get(patch_of(position))

    def refer(self, group: int, position: Position, reference: Reference) -> None:
        """Replace what a group is measured against for the tokens of `position`."""
        self.references[group][patch_of(position)] = reference

    def nbytes(self) -> int:
        """Bytes of all memories and references of this branch."""
        held = sum(m.nbytes() for patches in self.memories.values() for m in patches.values())
        references = (r for patches in self.references.values() for r in patches.values())
        return held + sum(r.hidden_states.nbytes + r.energy.nbytes for r in references)


def patch_of(position: Position) -> int:
    """Return the patch that a forward pass carries, or `WHOLE`."""
    return position.patch if position.patched else WHOLE
