"""What the compiler makes of every kernel, for every target and with both tritons, without a GPU: no
spills, matrix units wherever there is a product, no waiting inside its loop, wide accesses."""

import importlib
import json
import pkgutil

import pytest

import losia_kernels.kernels
from tests.kernels.compile_cases import CASES, ESSENTIAL
from tests.kernels.offline import HERE, OLDEST, run_offline

pytestmark = pytest.mark.slow

# KiB that one program may have
SHARED = {"sm_75": 64, "sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_90": 227, "sm_100": 227}
SHARED |= {"sm_120": 99, "gfx942": 64, "gfx1100": 64}
WITH_OLDEST = ("sm_80", "sm_90", "sm_100", "gfx942")
INDEX = {"8", "16"}  # bytes in which int64 indices come


class Compiled:
    """The cases on one target with one triton."""

    def __init__(self, arch: str, oldest: bool, whole: bool):
        words = [str(HERE / "compile_kernels.py"), *([] if whole else ["--essential"]), arch]
        said = json.loads(run_offline(*words, oldest=oldest))
        self.expected = set(CASES if whole else ESSENTIAL)
        self.arch, self.triton, self.kernels = arch, said["triton"], said["kernels"]
        self.nvidia = arch.startswith("sm_")
        if arch == "sm_75":  # the library multiplies, but for a form that a case asks for by name
            mine = [fact for fact in self.kernels if fact["kernel"] == "subnet_grad_kernel"]
            assert all("fused" in fact["case"] or "gathered" in fact["case"] for fact in mine)
            self.kernels = [fact for fact in self.kernels if fact not in mine]
        assert self.triton.startswith("3.6.") or not oldest

    def of(self, case: str) -> list[dict]:
        return [fact for fact in self.kernels if fact["case"] == case]

    def products(self) -> list[dict]:
        return [fact for fact in self.kernels if fact["product_of"]]


# all cases, or those that stand for them
PLACES = [pytest.param((arch, False, arch in WITH_OLDEST), id=arch) for arch in SHARED]
PLACES += [
    pytest.param((arch, True, arch == "sm_90"), id=f"{arch}-triton-3.6") for arch in WITH_OLDEST
]


@pytest.fixture(scope="module", params=PLACES)
def compiled(request) -> Compiled:
    arch, oldest, whole = request.param
    if oldest and not OLDEST.exists():
        pytest.skip(f"no {OLDEST}; make test fetches it")
    return Compiled(arch, oldest, whole)


def named(facts: list[dict]) -> list[tuple]:
    """For a message: what is wrong, and where."""
    keys = ("case", "kernel", "registers", "spills", "serialized", "copies_ahead", "loads")
    return [tuple(fact.get(key) for key in keys) for fact in facts]


def test_every_kernel_has_a_case(compiled):
    left_out = {"subnet_grad_kernel", "sum_kernel"} if compiled.arch == "sm_75" else set()
    if not left_out:
        assert {fact["case"] for fact in compiled.kernels} == compiled.expected
    assert {fact["kernel"] for fact in compiled.kernels} | left_out == kernels_in_package(), (
        "a kernel has no launch in compile_cases.py"
    )


def test_no_spills(compiled):
    """Triton 3.6 spills 8 bytes of the update on sm_100, and nothing else."""
    known = {("subnets_adamw_kernel", "sm_100", 8)} if compiled.triton < "3.7" else set()
    spilled = [fact for fact in compiled.kernels if fact["spills"]]
    found = {(fact["kernel"], fact["target"], fact["spills"]) for fact in spilled}
    assert found <= known, named(spilled)


def test_shared_memory_is_there(compiled):
    room = 1024 * SHARED[compiled.arch]
    assert not [fact for fact in compiled.kernels if fact["shared"] > room]
    assert any(fact["shared"] for fact in compiled.kernels)


def test_products_use_the_matrix_units(compiled):
    """Except NVIDIA's on float32, where only TF32 would, at the price of 13 bits, and gfx1100's,
    which has none for it."""
    exact = not compiled.nvidia and compiled.arch != "gfx1100"
    products = compiled.products()
    assert compiled.arch == "sm_75" or {"bf16", "f32"} <= {fact["product_of"] for fact in products}
    expected = [fact for fact in products if fact["product_of"] != "f32" or exact]
    assert not named([fact for fact in expected if not fact["matrix_units"]])


def test_no_product_waits_for_the_one_before(compiled):
    """ptxas C7515: "wgmma serialized"."""
    if compiled.nvidia:
        assert not named([fact for fact in compiled.products() if fact["serialized"]])


def test_the_next_tile_is_on_its_way_while_one_is_multiplied(compiled):
    """On sm_100 a gathered operand goes to the matrix units by way of shared memory, behind all
    copies."""
    if compiled.nvidia:
        waiting = [fact for fact in compiled.products() if fact["copies_ahead"] == 0]
        if compiled.arch == "sm_100":
            waiting = [fact for fact in waiting if "2" not in map(str, fact["loads"])]
        assert not named(waiting)
        assert compiled.arch == "sm_75" or any(fact["copies_ahead"] for fact in compiled.products())


def test_inside_the_loop_only_what_is_gathered_is_narrow(compiled):
    """Single entries are 2 bytes; all else comes 16 bytes at a time, whatever the sizes."""
    if compiled.nvidia:
        for fact in compiled.products():
            if fact["product_of"] != "f32":
                single = "aligned" not in fact["case"] and "none" not in fact["case"]
                assert set(fact["loads"]) <= ({2, 16} if single else {16}), named([fact])
                assert set(fact["copies"]) <= {16}, named([fact])


def test_all_is_written_16_bytes_at_a_time(compiled):
    """AMD's matrix units leave rows, or columns, that one thread holds a single entry of."""
    words = ("gather_features", "subnet_grad")
    for fact in compiled.kernels:
        if fact["case"].startswith(words) and "fp32" not in fact["case"]:
            turned = not compiled.nvidia and fact["case"].endswith(("wide", "wide-q"))
            single = (compiled.arch == "gfx1100" or turned) and fact["product_of"]
            both = {"4", "16"} if "in_kernel" in fact["case"] else {"4"}
            assert fact["store"].keys() == (both if single else {"16"}), named([fact])


def test_runs_of_neighbours_are_read_16_bytes_at_a_time(compiled):
    if compiled.arch == "gfx942" and compiled.triton < "3.7":
        pytest.skip("Triton 3.6 reads 2 bytes at a time on gfx942")
    for gather in compiled.kernels:
        if not gather["case"].startswith("gather_features-aligned") or "fp" in gather["case"]:
            continue
        assert "16" in gather["load"] and gather["load"].keys() <= INDEX
        for kernel in compiled.of(gather["case"].replace("gather_features", "subnet_grad")):
            assert kernel["load"].keys() <= INDEX and kernel["copy"].keys() <= {"16"}


def test_single_entries_are_read_2_bytes_at_a_time_and_one_tile_ahead(compiled):
    """A tile's loads are there twice: before the loop, and in it for the next tile. x beside it
    comes in vectors."""
    if compiled.arch == "sm_75":
        return
    # tokens * outputs of a tile, over the threads of 8 warps
    once = 32 * 64 // (8 * (64 if compiled.arch == "gfx942" else 32))
    for case in ("fused-bf16", "fused_wide-bf16", "smollm2", "tenth"):
        (kernel,) = compiled.of(f"subnet_grad-{case}")
        assert kernel["load"]["2"] >= 2 * once
        assert kernel["copy"].keys() == ({"16"} if compiled.nvidia else set())


def test_gathering_first_leaves_a_dense_product(compiled):
    gather, *product = compiled.of("subnet_grad-gathered-bf16")
    (alone,) = compiled.of("gather_features-bf16")
    assert [gather[kind] for kind in ("load", "copy", "store")] == [
        alone[kind] for kind in ("load", "copy", "store")
    ]
    for fact in product:
        assert fact["load"].keys() | fact["copy"].keys() == {"16"}


def test_runs_of_inputs_are_stored_together(compiled):
    """A thread's four values in one store, where they lie together; elsewhere one by one. Memory is
    bound by sectors, of which a warp then writes whole ones. (gfx942 stores both ways too, but not
    everywhere four values a thread.)"""
    for case, single, together in (("bf16", "2", "8"), ("fp32", "4", "16")):
        for fact in compiled.of(f"subnets_adamw-{case}"):
            state = 3 * (together == "16")  # of the subnet and its moments, four values each
            stores = fact["store"]
            if compiled.nvidia:
                assert stores[single] == 4 and stores[together] == 1 + state, named([fact])
            else:
                assert stores[single] and stores[together], named([fact])


def test_sums_of_splits_wait_for_what_they_read(compiled):
    """By the hardware's wait for the launch before, or counted with release and acquire; nothing
    else has either."""
    signals = {fact["kernel"]: set() for fact in compiled.kernels}
    for fact in compiled.kernels:
        signals[fact["kernel"]] |= {
            (fact["case"].split("-")[1], s) for s in fact.get("signals", [])
        }
    counted = {("in_kernel", "atom.global.gpu.acq_rel.add.u32")}
    dependent = compiled.nvidia and int(compiled.arch[3:]) >= 90
    if compiled.nvidia and compiled.arch != "sm_75":
        begun = {("dependent", "griddepcontrol.launch_dependents")} if dependent else set()
        assert signals.pop("subnet_grad_kernel") == counted | begun
        waits = {("dependent", "griddepcontrol.wait")} if dependent else set()
        assert signals.pop("sum_kernel") == waits
    assert not any(signals.values())


def kernels_in_package() -> set[str]:
    names = set()
    for module in pkgutil.iter_modules(losia_kernels.kernels.__path__, "losia_kernels.kernels."):
        names |= {
            name for name in vars(importlib.import_module(module.name)) if name.endswith("_kernel")
        }
    return names
