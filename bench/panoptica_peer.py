"""panoptica at the other end of a pipe: its pins (numpy < 2.3) need an environment of their own.

    PYTHON panoptica_peer.py PAIRS.npy

`PAIRS.npy` is uint8 [pairs, 2, *S], prediction and target. Each line on stdin is JSON, `{"pair": 0, "matching": "iou",
"threshold": 0.5}`; the answer is a line of JSON with the seconds that the evaluation took and its metrics.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import numpy as np


def _evaluator(matching: str, threshold: float) -> Any:
    from panoptica import (
        ConnectedComponentsInstanceApproximator,
        InputType,
        NaiveThresholdMatching,
        Panoptica_Evaluator,
    )
    from panoptica.metrics import Metric

    metric = Metric.IOU if matching == "iou" else Metric.DSC
    return Panoptica_Evaluator(
        expected_input=InputType.SEMANTIC,
        instance_approximator=ConnectedComponentsInstanceApproximator(),
        instance_matcher=NaiveThresholdMatching(metric, threshold, strict_threshold=True),
        instance_metrics=[Metric.DSC],
        global_metrics=[Metric.DSC],
    )


def _metrics(result: Any) -> dict[str, float]:
    """As `fastinstance.instance_metrics` names them."""
    return {
        "dsc": float(result.global_bin_dsc),
        "sen": float(result.rec),
        "ppv": float(result.prec),
        "pq": float(result.pq_dsc),
        "sq": float(result.sq_dsc),
        "rq": float(result.rq),
        "n_target": int(result.n_ref_instances),
        "n_pred": int(result.n_pred_instances),
        "n_missed": int(result.fn),
        "n_false": int(result.fp),
    }


def main() -> None:
    pairs = np.load(sys.argv[1])
    evaluators: dict[tuple[str, float], Any] = {}
    for line in sys.stdin:
        request = json.loads(line)
        key = request["matching"], request["threshold"]
        if key not in evaluators:
            evaluators[key] = _evaluator(*key)
        pred, target = pairs[request["pair"]]
        start = time.perf_counter()
        (result,) = evaluators[key].evaluate(pred, target, verbose=False).values()
        metrics = _metrics(result)  # some are computed when they are read
        seconds = time.perf_counter() - start
        print(json.dumps({"seconds": seconds, "metrics": metrics}), flush=True)


if __name__ == "__main__":
    main()
