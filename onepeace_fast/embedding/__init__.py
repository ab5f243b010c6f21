"""Embeddings of texts, images and sounds as they come: strings, files, Pillow images, arrays."""

from onepeace_fast.embedding.batches import Batches
from onepeace_fast.embedding.embedder import Embedder, Embeddings, from_pretrained

__all__ = ["Batches", "Embedder", "Embeddings", "from_pretrained"]
