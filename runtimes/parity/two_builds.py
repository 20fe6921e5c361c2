"""Two builds of one graph as a reference: one whose routers decide, one that takes decisions."""

from __future__ import annotations

from collections.abc import Mapping

from dlo_export.runtimes.runner import Runner, StepRequest, StepResult


class TwoBuildsRunner(Runner):
    """Runs each case on the build that it is for.

    A graph decides itself or is told, never both; PyTorch does either. So what is to be a reference like PyTorch has a
    build for each, and what a case starts with it keeps to.

    Args:
        free: Shows its routers' scores.
        forced: The same, its decisions from outside.
        name: For reports.
        thresholds: Of the routers, see `Runner`.
    """

    def __init__(self, free: Runner, forced: Runner, *, name: str, thresholds: Mapping[int, float]) -> None:
        super().__init__(
            name,
            num_layers=free.num_layers,
            routed_layers=free.routed_layers,
            last_logits_only=free.last_logits_only,
            thresholds=thresholds,
        )
        self._builds = {False: free, True: forced}
        self._sequences = 0
        self._running: Runner | None = None

    def _empty_cache(self, batch: int) -> None:
        self._sequences, self._running = batch, None

    def _compute(self, request: StepRequest) -> StepResult:
        build = self._builds[request.force_active is not None]
        if self._running is None:
            build.reset(self._sequences)
            self._running = build
        assert self._running is build, "a case is forced in all of its steps, or in none"
        return request.pass_on(build)

    def _free(self) -> None:
        for build in self._builds.values():
            build.close()
