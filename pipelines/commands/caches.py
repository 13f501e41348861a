"""What one does with a finished cache: inspect, verify, prune, merge, pack, unpack, push, pull."""

from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from pipelines.commands.app import command, say
from pipelines.commands.stages import Configure, cache_options

CACHES = "Look after a cache"
Cache = Annotated[Path, Argument(help="A cache, such as caches/TEACHER.")]
Folder = Annotated[Path, Argument(help="A new folder.")]
Out = Annotated[Path, Option("--out", help="A new folder.")]


@command(CACHES)
def inspect(
    folder: Cache,
    row: Annotated[str | None, Option(help="Show one row, by its id or number.")] = None,
    draw: Annotated[int, Option(help="With --row: of this draw.")] = 0,
    picture: Annotated[Path | None, Option(help="Also draw the cache, as PNG.")] = None,
) -> None:
    """Print what a cache holds: rows, masses, chunk lengths, likelihoods by t, bytes by column."""
    from teacher_cache.maintenance import inspect as inspection

    if row is not None:
        say(inspection.describe_row(folder, inspection.find_row(folder, row, draw)))
        return
    contents = inspection.inspect_cache(folder)
    say(inspection.describe(contents))
    if picture is not None:
        inspection.draw_picture(contents, picture)
        say(f"\n{picture}")


@command(CACHES, configure=cache_options)
def verify(
    configure: Configure,
    against: Annotated[str, Option(help="The engine: transformers or vllm.")] = "transformers",
    rows: Annotated[int, Option(min=0, help="To score again; 0: no teacher is loaded.")] = 200,
    tolerance: Annotated[float | None, Option(help="Nats; exit 1 where one is further.")] = None,
    delete_damaged: Annotated[bool, Option("--delete-damaged", help="Delete bad shards.")] = False,
    out: Annotated[Path | None, Option("--cache", help="Default: caches/TEACHER.")] = None,
) -> None:
    """Check every shard (checksums, schema, counts, values), then score a sample of rows again."""
    settings = configure(out=out, **{"engine.type": against})
    from teacher_cache.maintenance import verify as verification

    checked = verification.check_cache(settings.out)
    say(checked.in_words())
    if checked.problems:
        if delete_damaged:
            deleted = verification.delete_damaged(checked)
            say(f"deleted {deleted} shards; `tide cache` computes them again")
        raise typer.Exit(1)
    if rows == 0:
        return
    compared = verification.verify_cache(settings, rows)
    say(compared.in_words())
    if tolerance is not None and compared.largest > tolerance:
        raise typer.Exit(1)


@command(CACHES)
def prune(
    folder: Cache,
    out: Out,
    k: Annotated[int | None, Option(help="Logits a position, at most.")] = None,
    rank: Annotated[int | None, Option(help="Coefficients of the tail, at most.")] = None,
    draws: Annotated[int | None, Option(help="Draws of every example.")] = None,
) -> None:
    """A smaller cache from a larger; no teacher is loaded."""
    from teacher_cache.maintenance.derive import prune_cache

    made = prune_cache(folder, out, k=k, rank=rank, draws=draws)
    say(f"{out}: {made.draws} draws of {made.examples:,} examples, k {made.fingerprint.targets.k}")


@command(CACHES)
def merge(
    folders: Annotated[list[Path], Argument(help="Parts of a cache, or caches of other data.")],
    out: Out,
) -> None:
    """One cache out of several that are parts of one, or differ in their data alone."""
    from teacher_cache.maintenance.derive import merge_caches

    made = merge_caches(folders, out)
    say(f"{out}: {made.draws} draws of {made.examples:,} examples")


@command(CACHES)
def pack(folder: Cache, archive: Annotated[Path, Argument(help="Such as NAME.tar.zst.")]) -> None:
    """A whole cache as one file, with checksums."""
    from teacher_cache.maintenance.pack import pack_cache

    say(f"{archive}: {pack_cache(folder, archive):,} files, {archive.stat().st_size / 1e6:.1f} MB")


@command(CACHES)
def unpack(archive: Annotated[Path, Argument(help="From `tide pack`.")], folder: Folder) -> None:
    """The cache out of an archive, every byte checked."""
    from teacher_cache.maintenance.pack import unpack_cache

    say(f"{folder}: {unpack_cache(archive, folder):,} files")


@command(CACHES)
def push(folder: Cache, store: Annotated[str, Argument(help="s3://…, gs://…, a path.")]) -> None:
    """Copy a cache into an object store. Run again to resume."""
    from shared.cache.ledger import settle_ledger
    from shared.cache.manifest import load_manifest
    from shared.cache.stores import Store

    manifest = load_manifest(folder)
    pushed = Store.open(store).push(folder, manifest, settle_ledger(folder, manifest))
    say(f"{store}: {pushed:,} shards")


@command(CACHES)
def pull(store: Annotated[str, Argument(help="Of `tide push` or --store.")], folder: Cache) -> None:
    """Bring a cache from an object store, every file checked. Run again to resume."""
    from shared.cache.stores import Store

    say(f"{folder}: {Store.open(store).pull(folder):,} files")
