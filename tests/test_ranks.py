"""What ranks do together: nobody waits for a rank that met an error."""

from pathlib import Path

import torch
from processes import run_ranks

from train.ranks import ALONE


def as_ranks(folder: str) -> None:
    """Writes what each rank sees, on the default group and on one apart."""
    from train.engine import Engine

    engine = Engine()
    apart = engine.apart()
    seen = []
    for ranks in (engine, apart):
        seen.append(str(ranks.gather(ranks.rank * 10)))
        seen.append(str(ranks.together(lambda: engine.rank + 1)))
        seen.append(str(ranks.on_main(lambda: engine.rank + 7)))
        seen.append(str(ranks.reduce(torch.tensor(engine.rank + 1)).item()))

        def fails(on: int) -> int:
            if engine.rank == on:
                raise OSError(28, f"full on rank {on}")
            return 0

        for on, way in ((1, ranks.together), (0, ranks.together), (0, ranks.on_main)):
            try:
                way(lambda on=on: fails(on))
            except OSError as error:
                seen.append(f"{error.errno} {error.strerror} {error.met_by_all}")  # type: ignore[attr-defined]
        seen.append(str(ranks.gather("after")))
    apart.close()
    Path(folder, str(engine.rank)).write_text("\n".join(seen))
    engine.close()


def test_ranks_share_results_and_errors(tmp_path: Path) -> None:
    """The same on both ranks and in both groups; afterwards they go on together."""
    assert run_ranks(2, as_ranks, str(tmp_path)) == [0, 0]
    expected = ["[0, 10]", "[1, 2]", "7", "3"]
    expected += [f"28 full on rank {on} True" for on in (1, 0, 0)]
    expected.append("['after', 'after']")
    for rank in "01":
        assert (tmp_path / rank).read_text().split("\n") == 2 * expected


def test_one_alone_needs_no_group() -> None:
    assert ALONE.gather(3) == [3]
    assert ALONE.together(lambda: 4) == [4]
    assert ALONE.apart().on_main(lambda: 5, patient=True) == 5
    assert ALONE.reduce(torch.tensor(6)).item() == 6
