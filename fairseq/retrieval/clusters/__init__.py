"""Clusters of similar keys, RetoMaton's states: their files, k-means, and greedy merging of entries."""

from fairseq.retrieval.clusters.members import KIND, Clusters, load_clusters, save_clusters, save_members_pickle

__all__ = ["KIND", "Clusters", "load_clusters", "save_clusters", "save_members_pickle"]
