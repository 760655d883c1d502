"""Starting processes is what these tests cost: one start serves all tests of a module.

A module lists functions `job(rank, world_size, folder)` under `JOBS = {world_size: [job, ...]}` and
its tests ask the fixture `results` for what they returned.
"""

import importlib

import pytest

from tests.helpers.gloo import spawn_gloo


def run_jobs(rank, world_size, module, folder):
    """All jobs in turn in each process: {job: result}."""
    jobs = importlib.import_module(module).JOBS[world_size]
    return {job.__name__: job(rank, world_size, folder) for job in jobs}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where jobs of a module may leave files for each other."""
    return str(tmp_path_factory.mktemp("jobs"))


@pytest.fixture(scope="module")
def results(request, folder):
    """`results(world_size, job)` is the list over ranks of what the job returned."""
    done = {}

    def look_up(world_size, job):
        if world_size not in done:
            try:
                done[world_size] = spawn_gloo(world_size, run_jobs, request.module.__name__, folder)
            except Exception as error:  # once is enough: every test of these jobs shows it
                done[world_size] = error
        if isinstance(done[world_size], Exception):
            raise done[world_size]
        return [rank[job.__name__] for rank in done[world_size]]

    return look_up
