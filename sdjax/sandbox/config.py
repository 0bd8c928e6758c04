"""Limits on candidates: the `sandbox` section of a run's YAML file."""

from typing import Annotated, ClassVar

from pydantic import Field
from pydantic.dataclasses import dataclass

from sdjax.core.config import STRICT, NonEmptyStr, NonNegativeInt, PositiveFloat, PositiveInt
from sdjax.isolation.limits import WorkerLimits

REQUESTS_PER_COMPILER = 1_000  # compiled operations are reused, but executables take memory


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Limits:
    """Limits on one candidate.

    Verdicts are the same on every machine under one version of JAX, except those due to the clocks
    and to the address spaces.

    Attributes:
        source_bytes: size of the source text.
        ir_bytes: size of the IR that a worker sends.
        constant_bytes: size of all array constants of a candidate.
        step_budget: iterations of Python loops plus calls of Python functions in one trace.
        equations: weighted primitives of all array programs of a candidate (`primitives.weight`);
            as many again in their copies at the shapes of the probe tensors.
        nesting: depth of nested scan, while and cond.
        max_expansion: elements of one intermediate array, relative to the tensors of one expert;
            twice as many may be alive at once.
        cost_per_element: units of cost per element of the tensors in scope. A unit is a product of
            two elements, about 2 ns of one processor thread (`verify/primitive_costs.py`), so the
            default is 0.2 ms. Loops count with all their iterations: the costliest shipped method
            is charged 34,000 units for three experts.
        max_loop_iterations: iterations of one `while` loop.
        max_total_iterations: iterations of all loops of one array program, nested ones multiplied.
        probe_elements: larger tensors are probed at a reduced shape.
        max_probe_elements: elements per expert of a probe run at real shapes.
        max_probe_cost: units of cost of one probe run, and of one run of a trial. The default is
            about 4 s; 14 s for the slowest primitive, less than `compile_cpu_seconds`.
        cpu_seconds: processor time of a worker per candidate.
        wall_seconds: wall-clock time of a worker per candidate.
        address_space: virtual memory of a worker in bytes.
        compile_cpu_seconds: processor time to compile a candidate and run it for the first time.
        compile_wall_seconds: wall-clock time of the same.
        compile_address_space: virtual memory of a worker that compiles, in bytes.
    """

    RENAMED_KEYS: ClassVar = {"growth": "max_expansion", "fuel": "max_loop_iterations"}

    source_bytes: PositiveInt = 32_768
    ir_bytes: PositiveInt = 4 << 20
    constant_bytes: NonNegativeInt = 1 << 20
    step_budget: PositiveInt = 20_000
    equations: PositiveInt = 4_000
    nesting: NonNegativeInt = 8
    max_expansion: PositiveInt = 32
    cost_per_element: PositiveInt = 100_000
    max_loop_iterations: PositiveInt = 128
    max_total_iterations: PositiveInt = 1_000_000
    probe_elements: PositiveInt = 1 << 12
    max_probe_elements: PositiveInt = 1 << 20
    max_probe_cost: PositiveInt = 2_000_000_000
    cpu_seconds: PositiveInt = 4
    wall_seconds: PositiveFloat = 12.0
    address_space: Annotated[int, Field(ge=1 << 28)] = 2 << 30
    compile_cpu_seconds: PositiveInt = 20
    compile_wall_seconds: PositiveFloat = 60.0
    compile_address_space: Annotated[int, Field(ge=1 << 30)] = 6 << 30

    @property
    def worker(self) -> WorkerLimits:
        """Limits of the worker process that traces a candidate."""
        return WorkerLimits(
            cpu_seconds=self.cpu_seconds,
            wall_seconds=self.wall_seconds,
            address_space=self.address_space,
            message_bytes=self.ir_bytes,
        )

    @property
    def compiler(self) -> WorkerLimits:
        """Limits of the worker process that compiles a verified program and first runs it."""
        return WorkerLimits(
            cpu_seconds=self.compile_cpu_seconds,
            wall_seconds=self.compile_wall_seconds,
            address_space=self.compile_address_space,
            message_bytes=1 << 14,
            requests=REQUESTS_PER_COMPILER,
            compiles=True,
        )


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SandboxConfig(Limits):
    """The `sandbox` section of a run: limits and worker processes.

    Attributes:
        workers: number of candidates that are traced, and that are compiled, at the same time.
        allow_missing: layers of confinement that this machine may lack. The sandbox refuses to
            start if any other layer is missing.
        apply_seconds: maximum time to compile the merge of an admitted program and to merge with
            it, and before it is tuned, for one gradient step. `sdjax run` ends a run that takes
            longer and resumes it without the program; a run on several hosts must be resumed by
            the user.
    """

    workers: Annotated[int, Field(ge=1, le=1_000)] = 2
    allow_missing: tuple[NonEmptyStr, ...] = ()
    apply_seconds: PositiveFloat = 1800.0
