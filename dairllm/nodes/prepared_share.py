"""A node's share in a file of its own (`dairllm prepare`), found beside the model where there is one that belongs to it."""

from collections.abc import Callable, Sequence

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


def find_share(model: ModelFile, references: Sequence[WeightReference], identify: Callable[[], bytes] | None = None) -> ShareFile | None:
    """The file of the share that a node's weights are, located; None where there is none. One that is not used is told to the log.

    Args:
        references: all of the node's weights.
        identify: which model it is, asked only where a file of that share is there; its digests are looked up, or made, if None.

    Raises:
        FormatError: the model cannot be read.
    """
    for path in share_paths(model.path):
        try:
            file = ShareFile.open(path)
        except FormatError as error:
            log.warning("a prepared share is not used", reason=str(error))
            continue
        if _is_share(model.spec, file.contents.share, references):
            try:
                if file.contents.identity == (identify or (lambda: model_digests(model).identity))():
                    file.locate(model)
                    log.info("weights are read from the prepared share", share=str(path))
                    return file
                reason = f"it was made of another model than {model.path} is now; `dairllm prepare` makes it anew"
            except FormatError as error:
                reason = str(error)
            log.warning("a prepared share is not used", share=str(path), reason=reason)
        file.close()
    return None


def _is_share(spec: ModelSpec, share: Share, references: Sequence[WeightReference]) -> bool:
    """Whether weights are those of a share."""
    try:
        return all(reference.part == weight_part(spec, share, reference.name) for reference in references)
    except GraphError:
        return False
