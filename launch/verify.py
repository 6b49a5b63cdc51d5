"""`tombola data verify SOURCE`."""

import csv
import io
import json
import os
import sys
from collections import Counter
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from data.errors import RunError, UserError, did_you_mean
from data.files import Folder
from data.inspection import decode_with_dali
from data.layout import parse_source
from data.pipeline import require_dali
from data.verify import KINDS, Finding, Report, verify
from launch.progress import WorkDisplay

_COLUMNS = ("split", "class", "image", "finding", "detail")


def verify_data(
    source: str,
    *,
    allow: Sequence[str] = (),
    output: str = "verify.csv",
    num_workers: int | None = None,
    as_json: bool = False,
) -> None:
    """Prints what is wrong with a source, and lists it in the file `output`.

    Raises `RunError` where anything is that is not allowed.
    """
    _check(allow, output)
    kind, place = parse_source(source)
    decode = decode_with_dali if _has_dali() else None
    with WorkDisplay(images_of="checking images") as progress:
        try:
            report = verify(kind, place, decode=decode, num_workers=num_workers, progress=progress)
        except KeyboardInterrupt:
            raise RunError(
                "stopped: not all images were checked, and nothing was written"
            ) from None
    folder, _, name = output.rpartition("/")
    Folder(folder or ("/" if output.startswith("/") else ".")).write(name, _as_csv(report))
    if as_json:
        print(json.dumps(_document(report, allow), indent=1))
    else:
        _print(report, source, allow, output)
    num_faults = sum(finding.kind not in allow for finding in report.findings)
    if num_faults:
        noun = "finding" if num_faults == 1 else "findings"
        raise RunError(
            f"{source}: {num_faults:,} {noun} in {report.num_images:,} images; {output} lists them"
        )


def _check(allow: Sequence[str], output: str) -> None:
    for kind in allow:
        if kind not in KINDS:
            near = did_you_mean(kind, KINDS)
            raise UserError(
                f"--allow {kind}: there is no such finding{near} (known: {', '.join(KINDS)})"
            )
    if os.path.isdir(output) or output.endswith("/"):
        raise UserError(f"--output {output}: is a folder; give the name of a file")


def _has_dali() -> bool:
    try:
        require_dali()
    except UserError:
        print("note: DALI is not installed; Pillow alone decodes the images", file=sys.stderr)
        return False
    return True


# What is printed -------------------------------------------------------------------------


def _print(report: Report, source: str, allow: Sequence[str], output: str) -> None:
    console = Console(highlight=False, markup=False, emoji=False)
    others = (
        f" (files of other names, ignored: {report.num_ignored:,})" if report.num_ignored else ""
    )
    if not report.findings:
        console.print(
            f"{source}: all {report.num_images:,} images are fine{others}",
            soft_wrap=True,
        )
        return
    counts = Counter(finding.kind for finding in report.findings)
    table = Table("finding", "count", "what it means", "first example")
    table.columns[0].no_wrap = True
    table.columns[3].overflow = "fold"
    for kind, meaning in KINDS.items():
        if kind in counts:
            first = next(finding for finding in report.findings if finding.kind == kind)
            name = f"{kind} (allowed)" if kind in allow else kind
            table.add_row(name, f"{counts[kind]:,}", meaning, _example(first))
    console.print(table)
    if not set(counts) - set(allow):
        line = f"{source}: all {report.num_images:,} images are fine, but for what is allowed"
        console.print(f"{line}; {output} lists it{others}", soft_wrap=True)


def _example(finding: Finding) -> str:
    place = finding.image or f"{finding.split}, class {finding.class_name!r}"
    return f"{place}: {finding.detail}"


def _row(finding: Finding) -> dict[str, str]:
    values = (finding.split, finding.class_name, finding.image, finding.kind, finding.detail)
    return dict(zip(_COLUMNS, values, strict=True))


def _as_csv(report: Report) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, _COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(_row(finding) for finding in report.findings)
    return text.getvalue().encode("utf-8", "backslashreplace")


def _document(report: Report, allow: Sequence[str]) -> dict[str, object]:
    counts = Counter(finding.kind for finding in report.findings)
    return {
        "num_images": report.num_images,
        "num_ignored": report.num_ignored,
        "counts": {kind: counts[kind] for kind in KINDS if kind in counts},
        "allowed": sorted(set(allow)),
        "findings": [_row(finding) for finding in report.findings],
    }
