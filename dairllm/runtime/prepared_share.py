"""A node's share in a file of its own (`dairllm prepare`), found beside the model where there is one that belongs to it."""

from collections.abc import Callable, Sequence
from pathlib import Path

import structlog

from dairllm.errors import FormatError, GraphError
from dairllm.formats.digest import model_digests
from dairllm.formats.model_file import ModelFile
from dairllm.formats.share_file import ShareFile, share_paths
from dairllm.graph.model import ModelSpec
from dairllm.graph.references import WeightReference
from dairllm.graph.slicing import Share, weight_part

__all__ = ["find_share"]

log = structlog.get_logger()


def find_share(
    model: ModelFile,
    references: Sequence[WeightReference],
    identify: Callable[[], bytes] | None = None,
    told: dict[Path, str] | None = None,
) -> ShareFile | None:
    """The file of the share that a node's weights are, located; None where there is none.

    Args:
        references: all of the node's weights.
        identify: which model it is, asked only where a file of that share is there; its digests are looked up, or made, if None.
        told: what the log was told of each file last; what is new is told now. None: the log is told nothing.

    Raises:
        FormatError: the model cannot be read.
    """

    def is_news(path: Path, line: str) -> bool:
        if told is None or told.get(path) == line:
            return False
        told[path] = line
        return True

    for path in share_paths(model.path):
        try:
            file = ShareFile.open(path)
        except FormatError as error:
            if is_news(path, str(error)):
                log.warning("a prepared share is not used", reason=str(error))
            continue
        if _is_share(model.spec, file.contents.share, references):
            try:
                if file.contents.identity == (identify or (lambda: model_digests(model).identity))():
                    file.locate(model)
                    if is_news(path, ""):
                        log.info("weights are read from the prepared share", share=str(path))
                    return file
                reason = f"it was made of another model than {model.path} is now; `dairllm prepare` makes it anew"
            except FormatError as error:
                reason = str(error)
            if is_news(path, reason):
                log.warning("a prepared share is not used", share=str(path), reason=reason)
        file.close()
    return None


def _is_share(spec: ModelSpec, share: Share, references: Sequence[WeightReference]) -> bool:
    """Whether weights are those of a share."""
    try:
        return all(reference.part == weight_part(spec, share, reference.name) for reference in references)
    except GraphError:
        return False
