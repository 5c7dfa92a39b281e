"""`jaxrlhf doctor`: tries what a run needs, and says in one sentence each what is wrong and what to do."""

import dataclasses
import pathlib
from typing import ClassVar

import jax
from rich.console import Console

from jaxrlhf.training import diagnosis, processes
from jaxrlhf.training.progress import print_table
from jaxrlhf.training.sharding import parse_mesh


@dataclasses.dataclass(frozen=True, kw_only=True)
class Doctor:
    """Tries what a run needs: devices, mesh, collectives, the output folder, and one compiled step.

    Prints what it finds, and one sentence with the remedy for each thing that is wrong. Exits with 0 if nothing is, else
    with 1. Takes the flags of a run that say where it runs, or reads them with --config from the settings of any command.
    """

    READS_OTHERS: ClassVar[bool] = True

    output: pathlib.Path = pathlib.Path("runs")
    """Directory in which runs are to be written."""
    mesh: str = "data=-1"
    """Device mesh, such as fsdp=8 or tensor=2,data=-1, with axes data, fsdp, tensor and stencil."""
    processes: str | None = None
    """For several processes: auto on a TPU pod or under Slurm, or HOST:PORT,COUNT,INDEX for this process."""


def main(config: Doctor) -> None:
    """Runs the checks in all processes; the first process prints, unless JAX finds no devices.

    Raises:
        ValueError: --mesh is not written as a mesh is.
        SystemExit: with 1 if something is wrong in any process.
    """
    sizes = parse_mesh(config.mesh)
    works, devices = diagnosis.devices()
    versions = diagnosis.versions()
    findings = [versions, devices]
    several = works and jax.process_count() > 1
    if works:
        mesh, found = diagnosis.mesh_of(sizes)
        findings += [found, *([diagnosis.collectives(mesh)] if mesh is not None else [])]
    findings.append(diagnosis.output_folder(config.output))
    if several:
        findings += [diagnosis.same_versions(versions.rows), diagnosis.shared_output(config.output)]
    if works:
        findings.append(diagnosis.smoke_step())
    wrong = [sentence for found in findings for sentence in found.wrong]
    if works:
        wrong = processes.sentences_of_all(wrong)
    console = Console(quiet=works and not processes.is_first_process())
    print_table(console, "jaxrlhf doctor", {name: text for found in findings for name, text in found.rows.items()})
    for sentence in wrong or ["Nothing is wrong."]:
        console.print(sentence, soft_wrap=True, markup=False, highlight=False)
    if several:
        jax.distributed.shutdown()
    if wrong:
        raise SystemExit(1)
