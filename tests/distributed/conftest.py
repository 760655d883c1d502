"""Starting processes is what these tests cost: one start serves the jobs of all their modules.

A module lists functions `job(rank, world_size, folder)` under `JOBS = {world_size: [job, ...]}` and
its tests ask the fixture `results` for them.
"""

import importlib
import tempfile

import pytest

from tests.helpers.gloo import spawn_gloo


def run_jobs(rank, world_size, names, folder):
    """All jobs in turn in each process: {(module:job): result}."""
    results = {}
    for name in names:
        module, job = name.split(":")
        results[name] = getattr(importlib.import_module(module), job)(rank, world_size, folder)
    return results


class Results:
    """Results of jobs by rank; processes start when the first result is asked for."""

    def __init__(self, modules, folder):
        self._modules, self._folder, self._done = modules, folder, {}

    def __call__(self, world_size, job):
        if world_size not in self._done:
            names = [
                f"{module.__name__}:{job.__name__}"
                for module in self._modules
                for job in module.JOBS.get(world_size, ())
            ]
            try:
                self._done[world_size] = spawn_gloo(world_size, run_jobs, names, self._folder)
            except Exception as error:  # once is enough: every test of these jobs shows it
                self._done[world_size] = error
        if isinstance(self._done[world_size], Exception):
            raise self._done[world_size]
        return [ranks[f"{job.__module__}:{job.__name__}"] for ranks in self._done[world_size]]

    @property
    def folder(self):
        """Where jobs may leave files for other jobs."""
        return self._folder


@pytest.fixture(scope="session")
def results(request):
    """`results(world_size, job)` is the list over ranks of what the job returned."""
    found = {getattr(item, "module", None): None for item in request.session.items}
    with tempfile.TemporaryDirectory() as folder:
        yield Results([module for module in found if hasattr(module, "JOBS")], folder)
