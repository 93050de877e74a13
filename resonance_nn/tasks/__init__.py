"""What ``resonance train --task`` can train: each a file of data in, a model and batches out."""

from resonance_nn.tasks.audio import AudioClassification, AudioEventDetection
from resonance_nn.tasks.base import Build, Learning, Task
from resonance_nn.tasks.images import ImageClassification
from resonance_nn.tasks.language import LanguageModelling
from resonance_nn.tasks.masked import MaskedLanguageModelling
from resonance_nn.tasks.multimodal import MultimodalClassification, MultimodalRetrieval
from resonance_nn.tasks.text import SentenceEmbedding, TextClassification, TokenClassification
from resonance_nn.tasks.translation import Translation

TASKS: dict[str, type[Task]] = {
    task.name: task
    for task in (
        LanguageModelling,
        MaskedLanguageModelling,
        TextClassification,
        TokenClassification,
        SentenceEmbedding,
        Translation,
        ImageClassification,
        AudioClassification,
        AudioEventDetection,
        MultimodalClassification,
        MultimodalRetrieval,
    )
}

__all__ = ["TASKS", "Build", "Learning", "Task"]
