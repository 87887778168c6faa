"""Plans on disk: what is written comes back; anything else is refused, and nothing of it is executed."""

from __future__ import annotations

import copy
import io
import os
import pickle
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracles import func_hessian, func_jacobian
from sparse_cases import rosenbrock
from torch import Tensor

from torchzygote import HessianPlan, JacobianPlan, plan_hessian, plan_jacobian


def f(a: Tensor, b: Tensor) -> Tensor:
    return a[1:] * b.sin() + a[:-1].sort().values


def stretch(x: Tensor) -> Tensor:
    return x[1:] * x[:-1]


def energy(x: Tensor) -> Tensor:
    return stretch(x).square().sum()


A, B = torch.rand(6, dtype=torch.float64), torch.rand(5, dtype=torch.float64)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A plan's file."""
    file = tmp_path / "plan.npz"
    plan_jacobian(f, A, B).save(file)
    return file


# ---- there and back ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["forward", "reverse"])
def test_a_jacobian_plan_comes_back(mode: str, tmp_path: Path) -> None:
    plan = plan_jacobian(f, A, B, mode=mode)
    for name in ("plan", "plan.npz", "plan.pt"):
        plan.save(tmp_path / name)
        assert [file.name for file in tmp_path.iterdir()] == [name]
        found = JacobianPlan.load(str(tmp_path / name), f)
        (tmp_path / name).unlink()
        assert repr(found) == repr(plan)
        assert torch.equal(found.colors, plan.colors)
        assert found.patterns == plan.patterns
        for mine, its in zip(found.patterns, plan.patterns, strict=True):
            assert mine.is_local
            assert (mine.is_local, mine.operators, mine.unknown) == (its.is_local, its.operators, its.unknown)
        for J, E in zip(found(A, B), func_jacobian(f, A, B), strict=True):
            torch.testing.assert_close(J.to_dense(), E)


def test_a_hessian_plan_comes_back(tmp_path: Path) -> None:
    plan = plan_hessian(rosenbrock, A)
    plan.save(tmp_path / "plan.npz")
    found = HessianPlan.load(tmp_path / "plan.npz", rosenbrock, mode="forward_over_reverse", chunk_size=2)
    assert repr(found) == repr(plan)
    torch.testing.assert_close(found(A + 1).to_dense(), func_hessian(rosenbrock, A + 1))
    torch.testing.assert_close(found.diagonal(A), func_hessian(rosenbrock, A).diagonal())
    with pytest.raises(ValueError, match="mode: expected one of"):
        HessianPlan.load(tmp_path / "plan.npz", rosenbrock, mode="sideways")


def test_a_plan_comes_back_from_beside_a_folder_of_its_name(tmp_path: Path) -> None:
    """As ``numpy.savez`` would have named the file."""
    (tmp_path / "plan").mkdir()
    plan = plan_jacobian(f, A, B)
    with pytest.raises(IsADirectoryError):
        plan.save(tmp_path / "plan")
    plan.save(tmp_path / "plan.npz")
    assert repr(JacobianPlan.load(tmp_path / "plan", f)) == repr(plan)


def test_a_plan_comes_back_from_a_file_that_was_there(tmp_path: Path) -> None:
    """As ``tempfile.mkstemp`` makes one."""
    path = tmp_path / "plan"
    path.touch()
    plan = plan_hessian(rosenbrock, A)
    plan.save(path)
    assert repr(HessianPlan.load(path, rosenbrock)) == repr(plan)


@pytest.mark.parametrize("x", [torch.rand(0), torch.tensor(2.0), torch.rand(2, 3).half()])
def test_odd_arguments_come_back(x: Tensor, tmp_path: Path) -> None:
    plan = plan_jacobian(torch.square, x)
    plan.save(tmp_path / "plan")
    (J,) = JacobianPlan.load(tmp_path / "plan", torch.square)(x)
    assert torch.equal(J.to_dense(), plan(x)[0].to_dense())
    second = plan_hessian(lambda x: x.sum(), x)
    second.save(tmp_path / "second")
    assert HessianPlan.load(tmp_path / "second", lambda x: x.sum())(x).shape == second(x).shape


def test_settings_are_those_of_the_call_that_loads(path: Path) -> None:
    plan = JacobianPlan.load(path, lambda a, b: f(a, b)[:, None], argnums=[0, 1], chunk_size=1, verify=False)
    for J, E in zip(plan(A, B), func_jacobian(f, A, B), strict=True):
        torch.testing.assert_close(J.to_dense(), E)


def diffused(c: Tensor, u: Tensor, dt: float) -> Tensor:
    return c * u - dt * (u.roll(1) - 2 * u)


@pytest.mark.parametrize("argnums", [1, -2, [1], (0, 1), [0, 1, -1], np.int64(1)])
def test_argnums_come_back(argnums: Any, tmp_path: Path) -> None:
    args = torch.rand(5, dtype=torch.float64), A[:5], 0.1
    plan = plan_jacobian(diffused, *args, argnums=argnums)
    plan.save(tmp_path / "plan")
    for loaded in (
        JacobianPlan.load(tmp_path / "plan", diffused),
        JacobianPlan.load(tmp_path / "plan", diffused, argnums=argnums),
    ):
        found, expected = loaded(*args[:2], 0.2), plan(*args[:2], 0.2)
        assert len(found) == len(expected)
        for mine, its in zip(found, expected, strict=True):
            assert (mine is None) == (its is None)
            assert mine is None or torch.equal(mine.to_dense(), its.to_dense())
        assert not torch.equal(found[1].to_dense(), plan(*args)[1].to_dense())


def test_argnums_of_the_call_that_loads_come_first(tmp_path: Path) -> None:
    plan_jacobian(torch.mul, A, A, argnums=0).save(tmp_path / "plan")
    found = JacobianPlan.load(tmp_path / "plan", torch.mul, argnums=1)(A, A + 1)
    assert found[0] is None
    assert torch.equal(found[1].to_dense(), A.diag())


def test_files_without_argnums_are_read_as_before(tmp_path: Path) -> None:
    """Those of version 0.1 don't hold any."""
    path = tmp_path / "plan.npz"
    plan_jacobian(diffused, A, A, 0.1, argnums=[0, 1]).save(path)
    with np.load(path) as file:
        np.savez(path, **{name: file[name] for name in file.files if name != "argnums"})
    J = JacobianPlan.load(path, lambda c, u: diffused(c, u, 0.2))(A, A)[0]
    assert torch.equal(J.to_dense(), A.diag())
    with pytest.raises(ValueError, match="expected 2 differentiated arguments"):
        JacobianPlan.load(path, diffused)(A, A, 0.2)
    for damaged in (np.array(0.5), np.array([[0]]), np.array("0")):
        np.savez(tmp_path / "damaged.npz", **{**np.load(path), "argnums": damaged})
        refused(tmp_path / "damaged.npz", "its argnums are neither")


class Interrupted(BaseException):
    pass


def test_what_is_broken_off_leaves_files_as_they_were(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def savez(stream: Any, **arrays: Any) -> None:
        stream.write(b"PK")
        raise Interrupted

    before = path.read_bytes()
    monkeypatch.setattr(np, "savez_compressed", savez)
    for target in (path, path.parent / "another"):
        with pytest.raises(Interrupted):
            plan_jacobian(f, A, B).save(target)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_all_that_can_be_opened_is_written_to(path: Path, tmp_path: Path) -> None:
    plan = plan_jacobian(f, A, B)
    link = tmp_path / "link"
    link.symlink_to(path)
    path.write_bytes(b"old")
    plan.save(link)
    assert link.is_symlink()
    JacobianPlan.load(path, f)
    plan.save(os.devnull)
    with tempfile.NamedTemporaryFile() as file:
        plan.save(file.name)
        assert file.read() == path.read_bytes()


def test_what_is_no_path_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"PathLike|path"):
        plan_jacobian(f, A, B).save(io.BytesIO())  # type: ignore[arg-type]
    with pytest.raises(IsADirectoryError):
        plan_jacobian(f, A, B).save(tmp_path)


@pytest.mark.parametrize("made", [plan_jacobian, plan_hessian])
def test_plans_are_pickled(made: Any) -> None:
    """With what earlier calls have left."""
    plan = made(stretch if made is plan_jacobian else energy, A)
    expected = plan.values(A)
    for again in (pickle.loads(pickle.dumps(plan)), copy.deepcopy(plan)):
        torch.testing.assert_close(again.values(A), expected)
        pushed = torch.func.jvp(lambda x: again.values(x), (A,), (A,))[0]
        torch.testing.assert_close(pushed, expected)


# ---- what is refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [JacobianPlan, HessianPlan])
def test_what_is_no_function_is_refused(kind: type[Any], path: Path) -> None:
    with pytest.raises(TypeError, match=rf"{kind.__name__}.load: f: expected the function .*, got int"):
        kind.load(path, 3)


def test_a_loaded_plan_is_checked_against_its_function(path: Path) -> None:
    other = lambda a, b: a[1:] * b.flip(0)
    with pytest.warns(UserWarning, match="differs from plain automatic differentiation"):
        found = JacobianPlan.load(path, other)(A, B)
    for J, E in zip(found, func_jacobian(other, A, B), strict=True):
        torch.testing.assert_close(J.to_dense(), E)
    with pytest.raises(ValueError, match=r"input 0, shape: expected \(6,\), got \(7,\)"):
        JacobianPlan.load(path, f)(torch.rand(7), B)


def test_a_file_holds_arrays_only(path: Path) -> None:
    with zipfile.ZipFile(path) as file:
        assert all(name.endswith(".npy") for name in file.namelist())
    with np.load(path, allow_pickle=False) as file:
        assert {file[name].dtype.kind for name in file.files} <= set("iubU")


# ---- anything else -----------------------------------------------------------------------------------------


def refused(path: Path, reason: str, kind: type[Any] = JacobianPlan) -> None:
    with pytest.raises(ValueError, match=reason) as caught:
        kind.load(path, f)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert f"expected a {kind.__name__} saved by torchzygote, but" in message


def test_another_kind_of_plan(path: Path, tmp_path: Path) -> None:
    refused(path, "it holds a JacobianPlan", HessianPlan)
    plan_hessian(rosenbrock, A).save(tmp_path / "second.npz")
    refused(tmp_path / "second.npz", "it holds a HessianPlan")


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        JacobianPlan.load(tmp_path / "plan.npz", f)


class Bomb:
    """Its pickle makes a file as it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def foreign() -> dict[str, Callable[[Path, Path], None]]:
    def arrays(**fields: Any) -> Callable[[Path, Path], None]:
        return lambda path, _: np.savez(path, **fields)

    def text(path: Path, _: Path) -> None:
        path.write_text("no plan")

    def nothing(path: Path, _: Path) -> None:
        path.write_bytes(b"")

    def one_array(path: Path, _: Path) -> None:
        with open(path, "wb") as stream:
            np.save(stream, np.arange(3))

    def pickled(path: Path, mark: Path) -> None:
        path.write_bytes(pickle.dumps(Bomb(mark)))

    def of_torch(path: Path, mark: Path) -> None:
        torch.save({"format": Bomb(mark)}, path)

    def object_array(path: Path, mark: Path) -> None:
        np.savez(path, format=np.array(Bomb(mark), dtype=object))

    def archive(path: Path, _: Path) -> None:
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("format.npy", b"no array")

    return {
        "text": text,
        "nothing": nothing,
        "one array": one_array,
        "pickled": pickled,
        "of torch.save": of_torch,
        "object array": object_array,
        "archive of something else": archive,
        "other arrays": arrays(x=np.arange(3)),
        "another format": arrays(format=np.array("einsum plan")),
        "a number for a word": arrays(format=np.array(3)),
        "a later version": arrays(format=np.array("torchzygote plan"), version=np.array(2)),
    }


@pytest.mark.parametrize("name", foreign())
def test_foreign_files(name: str, tmp_path: Path) -> None:
    path, mark = tmp_path / "plan.npz", tmp_path / "executed"
    foreign()[name](path, mark)
    refused(path, "but")
    refused(path, "but", HessianPlan)
    assert not mark.exists()


def test_the_bomb_is_one(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Bomb(tmp_path / "executed")))
    assert (tmp_path / "executed").exists()


def test_an_object_array_in_the_place_of_any_field(path: Path, tmp_path: Path) -> None:
    with np.load(path) as file:
        fields = {name: file[name] for name in file.files}
    mark = tmp_path / "executed"
    for name in fields:
        np.savez(path, **{**fields, name: np.array([Bomb(mark)], dtype=object)})
        refused(path, "Object arrays cannot be loaded")
    assert not mark.exists()


def test_every_field_is_needed(path: Path) -> None:
    with np.load(path) as file:
        fields = {name: file[name] for name in file.files}
    for name in fields:
        np.savez(path, **{other: value for other, value in fields.items() if other != name})
        refused(path, f"the field {name} is missing")


def changed(fields: dict[str, Any]) -> list[tuple[str, Any, str]]:
    """A field, a damaged value for it, and what the message must say."""
    return [
        ("rows", np.array(-1), "it has -1 rows"),
        ("rows", np.array(7), "row pointers"),
        ("rows", np.array(5.0), "is no integer"),
        ("count", np.array(0), "0 inputs"),
        ("count", np.array(3), "field shape_2 is missing"),
        ("mode", np.array("sideways"), "its mode is 'sideways'"),
        ("colors", fields["colors"] * 0, "doesn't separate the entries"),
        ("colors", fields["colors"] - 1, "negative"),
        ("colors", fields["colors"][1:], "colors for"),
        ("colors", fields["colors"] + 10**12, "numbers"),
        ("colors", fields["colors"].astype(np.int32), "no vector of 64-bit integers"),
        ("colors", fields["colors"][:, None], "no vector of 64-bit integers"),
        ("indices_0", fields["indices_0"] + 3, "outside 0 to 5"),
        ("indices_0", fields["indices_0"] - 1, "outside 0 to 5"),
        ("indices_0", fields["indices_0"][::-1].copy(), "don't ascend"),
        ("indices_0", fields["indices_0"][1:], "row pointers of pattern 0"),
        ("indptr_1", fields["indptr_1"][::-1].copy(), "row pointers of pattern 1"),
        ("indptr_1", fields["indptr_1"] + 1, "row pointers of pattern 1"),
        ("shape_0", np.array([-6]), "input 0 has shape"),
        ("shape_0", np.array([10**10, 10**10]), "input 0 has shape"),
        ("kind_0", np.array("int"), "input 0 has"),
        ("dtype_1", np.array("load"), "input 1 has"),
        ("device_0", np.array("toaster"), "device 'toaster'"),
        ("device_0", np.array("cuda"), "several devices"),
        ("operators_0", np.array(3), "but"),
    ]


@pytest.mark.parametrize("which", range(25))
def test_damaged_fields(which: int, path: Path) -> None:
    with np.load(path) as file:
        fields = {name: file[name] for name in file.files}
    name, value, reason = changed(fields)[which]
    np.savez(path, **{**fields, name: value})
    refused(path, reason)


def test_files_cut_short(path: Path) -> None:
    whole = path.read_bytes()
    for length in [*range(0, len(whole), 97), len(whole) - 1]:
        path.write_bytes(whole[:length])
        refused(path, "but")


def test_a_flipped_bit_is_refused_or_harmless(path: Path) -> None:
    """Some bits of an archive have no meaning, such as a date; no other one may pass."""
    whole = path.read_bytes()
    plan = JacobianPlan.load(path, f)
    generator = torch.Generator().manual_seed(0)
    passed = 0
    for position in torch.randint(8 * len(whole), (400,), generator=generator).tolist():
        damaged = bytearray(whole)
        damaged[position // 8] ^= 1 << (position % 8)
        path.write_bytes(bytes(damaged))
        try:
            found = JacobianPlan.load(path, f)
        except ValueError:  # anything else is a failure
            continue
        passed += 1
        assert found.patterns == plan.patterns
        assert torch.equal(found.colors, plan.colors)
        assert found._inputs == plan._inputs
    assert passed < 250


def test_a_stream_of_zeros_in_an_archive_is_refused(path: Path) -> None:
    with np.load(path) as file:
        fields = {name: file[name] for name in file.files}
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "<i8", "fortran_order": False, "shape": (10**12,)})
    with zipfile.ZipFile(path, "w") as file:
        for name, value in fields.items():
            if name == "colors":
                file.writestr("colors.npy", buffer.getvalue() + b"\0" * 64)
                continue
            one = io.BytesIO()
            np.save(one, value)
            file.writestr(f"{name}.npy", one.getvalue())
    refused(path, "but")
