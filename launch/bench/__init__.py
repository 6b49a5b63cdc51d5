"""The benchmarks, each a ratio against its reference in one run."""

from collections.abc import Callable

from launch.bench.allreduce import bench_allreduce
from launch.bench.checkpoint import bench_checkpoint
from launch.bench.engine import bench_engine
from launch.bench.imp import bench_imp
from launch.bench.loader import bench_loader
from launch.bench.masks import bench_masks
from launch.bench.scores import bench_scores
from launch.bench.semi_structured import bench_semi_structured
from launch.bench.store import bench_store
from launch.bench.threshold import bench_threshold
from launch.bench.xnor import bench_xnor

BENCHMARKS: dict[str, Callable[..., None]] = {
    "engine": bench_engine,
    "masks": bench_masks,
    "allreduce": bench_allreduce,
    "checkpoint": bench_checkpoint,
    "store": bench_store,
    "threshold": bench_threshold,
    "loader": bench_loader,
    "scores": bench_scores,
    "xnor": bench_xnor,
    "semi-structured": bench_semi_structured,
    "imp": bench_imp,
}
