"""Finished models in an object store, beside the run's own directory; checkpoints stay in the file system that all nodes see."""

from collections.abc import Callable
from pathlib import Path

from minigpt_ray.model_directory import ExportError


def check_store(url: str | None) -> None:
    """Try to write below a URL (s3://, gs://, abfs://, hdfs://, file://). Raises ValueError, with the remedy, when that cannot be."""
    if url is None:
        return
    from pyarrow.fs import FileSystem

    try:
        store, path = FileSystem.from_uri(url)
        store.create_dir(path)
        with store.open_output_stream(f"{path}/.minigpt_ray") as stream:
            stream.write(b"may be removed")
        store.delete_file(f"{path}/.minigpt_ray")
    except (OSError, ValueError) as error:  # pyarrow's own errors are among these
        reason = str(error).splitlines()[0]
        raise ValueError(f"export_to={url}: nothing can be written there ({reason}); correct the URL, or give the driver's environment credentials") from error


def deliver(model: Path, url: str | None, run: str, stage: str, say: Callable[[str], object]) -> None:
    """Say where a finished model is, after it was copied to <url>/<run>/<stage> when there is a URL. Raises ExportError."""
    say(f"the model is in {model}")
    if url is not None:
        from pyarrow.fs import FileSystem, copy_files

        copy = f"{url.rstrip('/')}/{run}/{stage}"
        try:
            store, path = FileSystem.from_uri(copy)
            store.create_dir(path)
            copy_files(str(model), path, destination_filesystem=store)
        except OSError as error:
            reason = str(error).splitlines()[0]
            raise ExportError(f"{copy}: the model could not be copied there ({reason}); mend the store, and checkpoint.resume=auto copies it again") from error
        say(f"and in {copy}")
