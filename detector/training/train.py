"""The training loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from detector import distributed
from detector.config import Config, resolve_data_paths
from detector.training.checkpoints import how_to_resume
from detector.training.micro_batch import explain_evaluation_out_of_memory, explain_out_of_memory, parts_that_fit
from detector.training.ownership import owned_by_first_process
from detector.training.run import finished_metrics, load_states, open_run
from detector.training.signals import stop_on_signal
from detector.training.step import optimizer_step, train_step
from detector.training.validation import score_best, validate


def train(config: Config, output_dir: Path, *, resume: str | None = None) -> dict[str, Any]:
    """Train a detector, with evaluations and checkpoints on the way.

    Args:
        config: of the run.
        output_dir: the run's folder; see README, "What a run leaves behind".
        resume: None for a fresh run; "auto" to resume from the newest checkpoint, if there is one; or a checkpoint's
            path.

    Returns:
        The content of metrics.json.

    Raises:
        RunError, ConfigError, DatasetError, WeightsError, CheckpointError: user errors.
        Interrupted: after SIGINT, SIGTERM or SIGHUP, with a checkpoint of the last finished step saved.
    """
    config = resolve_data_paths(config)
    with (
        distributed.process_group(config.train.device, timeout=config.train.rank_timeout) as device,
        owned_by_first_process(output_dir) as warning,
        stop_on_signal() as stop,
    ):
        config, resumed, source = load_states(config, output_dir, resume)
        if resumed is not None and resumed.finished:
            return finished_metrics(output_dir)
        with (
            open_run(config, output_dir, resumed=resumed, source=source, device=device, stop=stop) as run,
            how_to_resume(output_dir),
        ):
            if warning is not None:
                run.log.warn(warning)
            stop.waits_for_step = True
            for epoch in run.remaining_epochs():
                with explain_out_of_memory(run.config, run.learner, run.reader.sampler, run.state):
                    for micro_batches in run.remaining_steps(epoch):
                        run.stop_if_requested()
                        run.schedule_lr()
                        result = None
                        while result is None:  # again, in smaller parts, if memory runs out
                            with parts_that_fit(micro_batches, run.learner, run.state, run.log) as parts:
                                result = train_step(run.learner, parts)
                        run.record_step(result, parts)
                        optimizer_step(run.learner, result, step=run.state.step + 1)
                        run.finish_step()
                if run.evaluates_after(epoch):
                    run.state.evaluation_due = True
                    run.save()  # an evaluation may take long, and a signal must not wait for its end
                    with explain_evaluation_out_of_memory(run.config):
                        validate(run, epoch + 1)
                    run.state.evaluation_due = False
                run.state.finished = run.finishes_after(epoch)
                if run.val_set is None:
                    run.save_best()
                if run.state.finished:
                    break
                run.save()
            stop.waits_for_step = False
            metrics = score_best(run)  # a signal ends it at once: the run resumes with the evaluation before it
            run.save()  # as finished, after everything else is written
            return metrics
