"""What one does with a finished cache: inspect, verify, prune, merge, pack, unpack, push, pull."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipelines.commands.app import Recipe, Sets, TeacherName, TeachersFile, app
from pipelines.terminal.text import say

Cache = Annotated[Path, typer.Argument(help="A cache, such as caches/TEACHER.")]
Out = Annotated[Path, typer.Option("--out", help="A new folder.")]


@app.command()
def inspect(
    folder: Cache,
    row: Annotated[
        str | None, typer.Option(help="Show one row: an example's id, or its number.")
    ] = None,
    draw: Annotated[int, typer.Option(help="With --row: of this draw.")] = 0,
    picture: Annotated[
        Path | None, typer.Option(help="Also draw the cache, to a PNG file.")
    ] = None,
) -> None:
    """Print what a cache holds: rows, masses, chunk lengths, likelihoods by t, bytes by column."""
    from teacher_cache.maintenance.inspect import describe, inspect_cache

    if row is not None:
        from teacher_cache.maintenance.show_row import describe_row, find_row

        say(describe_row(folder, find_row(folder, row, draw)))
        return
    found = inspect_cache(folder)
    say(describe(found))
    if picture is not None:
        from teacher_cache.maintenance.picture import draw_picture

        draw_picture(found, picture)
        say(f"\n{picture}")


@app.command()
def verify(
    teacher: TeacherName = None,
    against: Annotated[
        str, typer.Option(help="The engine to score with: transformers or vllm.")
    ] = "transformers",
    rows: Annotated[
        int, typer.Option(help="Rows to score again; 0: none, and no teacher is loaded.")
    ] = 200,
    tolerance: Annotated[
        float | None, typer.Option(help="Exit with 1 where a value is further off (nats).")
    ] = None,
    delete_damaged: Annotated[
        bool, typer.Option("--delete-damaged", help="Delete shards that do not hold.")
    ] = False,
    model: Annotated[
        str | None, typer.Option(help="Path or hub id of the teacher's weights.")
    ] = None,
    student_tokenizer: Annotated[
        str | None, typer.Option(help="Path or hub id of the student's tokenizer.")
    ] = None,
    data: Annotated[str | None, typer.Option(help="The data of the cache.")] = None,
    out: Annotated[
        Path | None, typer.Option("--cache", help="The cache (default: caches/TEACHER).")
    ] = None,
    config: Recipe = None,
    teachers_file: TeachersFile = None,
    sets: Sets = None,
) -> None:
    """Check every shard (checksums, schema, counts, values), then score a sample of rows again."""
    from pipelines.recipes.read import cache_config
    from teacher_cache.maintenance.check import check_cache
    from teacher_cache.maintenance.check import delete_damaged as delete_shards
    from teacher_cache.maintenance.verify import verify_cache
    from teacher_cache.maintenance.wording import in_words

    extra = [f"engine.type={against}"]
    flags = {"model": model, "student_tokenizer": student_tokenizer, "out": out, "data": data}
    settings = cache_config(teacher, config, [*(sets or []), *extra], teachers_file, **flags)
    checked = check_cache(settings.out)
    say(in_words(checked))
    if checked.problems:
        if delete_damaged:
            say(f"deleted {delete_shards(checked)} shards; `tide cache` computes them again")
        raise typer.Exit(1)
    if rows == 0:
        return
    found = verify_cache(settings, rows)
    say(in_words(found))
    if tolerance is not None and found.largest > tolerance:
        raise typer.Exit(1)


@app.command()
def prune(
    folder: Cache,
    out: Out,
    k: Annotated[int | None, typer.Option(help="Logits a position, at most.")] = None,
    classes: Annotated[int | None, typer.Option(help="Classes of the tail.")] = None,
    draws: Annotated[int | None, typer.Option(help="Draws of every example.")] = None,
) -> None:
    """A smaller cache from a larger; no teacher is loaded."""
    from teacher_cache.maintenance.prune import prune_cache

    made = prune_cache(folder, out, k, draws, classes)
    targets = made.fingerprint.targets
    say(
        f"{out}: {made.draws} draws of {made.examples:,} examples, k {targets.k}, {targets.classes} classes"
    )


@app.command()
def merge(
    folders: Annotated[
        list[Path], typer.Argument(help="Parts of one cache, or caches that differ in data alone.")
    ],
    out: Out,
) -> None:
    """One cache out of several."""
    from teacher_cache.maintenance.reshape import merge_caches

    made = merge_caches(folders, out)
    say(f"{out}: {made.draws} draws of {made.examples:,} examples")


@app.command()
def pack(
    folder: Cache, archive: Annotated[Path, typer.Argument(help="Such as NAME.tar.zst.")]
) -> None:
    """A whole cache as one file, with checksums."""
    from teacher_cache.maintenance.pack import pack_cache

    say(f"{archive}: {pack_cache(folder, archive):,} files, {archive.stat().st_size / 1e6:.1f} MB")


@app.command()
def unpack(
    archive: Annotated[Path, typer.Argument(help="From `tide pack`.")],
    folder: Annotated[Path, typer.Argument(help="A new folder.")],
) -> None:
    """The cache out of an archive, every byte checked."""
    from teacher_cache.maintenance.unpack import unpack_cache

    say(f"{folder}: {unpack_cache(archive, folder):,} files")


@app.command()
def push(
    folder: Cache, store: Annotated[str, typer.Argument(help="s3://…, gs://…, hf://… or a path.")]
) -> None:
    """Copy a cache into an object store. Run again to resume."""
    from shared.cache.ledger import settle_ledger
    from shared.cache.manifest import load_manifest
    from shared.cache.stores import Store

    manifest = load_manifest(folder)
    pushed = Store.open(store).push(folder, manifest, settle_ledger(folder, manifest))
    say(f"{store}: {pushed:,} shards")


@app.command()
def pull(
    store: Annotated[str, typer.Argument(help="Where `tide push` or --store put a cache.")],
    folder: Cache,
) -> None:
    """Bring a cache from an object store, every file checked. Run again to resume."""
    from shared.cache.stores import Store

    say(f"{folder}: {Store.open(store).pull(folder):,} files")
