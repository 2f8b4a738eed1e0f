"""fit, validate and test: Lightning's command line, with what it lacks.

A bare ``test`` takes the newest run's best checkpoint with that run's own settings; ``fit --ckpt_path last`` goes on in
the run's own folder; precision follows the hardware.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from jsonargparse.typing import register_type
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import LearningRateMonitor, ProgressBar, TQDMProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins import Precision
from lightning.pytorch.utilities import rank_zero_info

from digitnet.augment import verify_augmentation
from digitnet.callbacks import (
    Calibrate,
    HyperparameterSummary,
    PrintEpochs,
    RestoreBestWeights,
    StepLoss,
    StopOnNaN,
    Throughput,
)
from digitnet.checkpoints import FIT_HINT, LOG_DIR, count_trained_on, find_folder
from digitnet.classifier import DigitClassifier
from digitnet.data import MNISTDataModule
from digitnet.files import tell_command
from digitnet.guards import (
    FIXED,
    explain_failures,
    verify_is_text,
    verify_limits,
    verify_optimization,
    verify_sections,
    verify_settings,
    verify_unseen,
)
from digitnet.imports import limit_imports
from digitnet.machine import choose_precision, keep_freed_memory
from digitnet.origin import Origin, choose_once, choose_origin
from digitnet.parsing import HelpFormatter, OneLineErrors
from digitnet.pictures import Pictures
from digitnet.resuming import (
    RunCheckpoint,
    RunEarlyStopping,
    SaveConfig,
    SeedEachEpoch,
    StopCleanly,
    WholeCheckpointIO,
    find_keeper,
)
from digitnet.run_folder import claim_folder, find_first_logger, prepare_loggers, read_precision
from digitnet.scores import WriteScores, find_report_folder

# What the table of runs shows of the trainer, as it changes what is learned.
SUMMARIZED = ("max_epochs", "max_steps", "gradient_clip_val", "accumulate_grad_batches", "check_val_every_n_epoch")
# Settings of the trainer that validate and test go without: every image is scored, whatever the training left out, and
# nothing is logged.
LEFT_OUT = {
    "logger": False, "fast_dev_run": False, "overfit_batches": 0.0, "limit_val_batches": None,
    "limit_test_batches": None,
}  # fmt: skip
USAGE = "python -m digitnet {} [--config FILE.yaml] [--flag value ...]"
DESCRIPTIONS = {
    "fit": f"""Train a digit classifier.
  {FIT_HINT}
  {FIT_HINT} --model.dropout 0.5 --trainer.max_epochs 20
  {FIT_HINT} --model.optimizer torch.optim.SGD --model.optimizer.lr 0.01
  python -m digitnet fit --ckpt_path last     resume the newest run, in its folder and with its settings
Each run gets a folder lightning_logs/<name>/version_N with config.yaml, TensorBoard events, checkpoints/best.ckpt (best
validation accuracy, for test) and checkpoints/last.ckpt (for going on). A config says only what differs from the
defaults below; --print_config shows the whole.""",
    "validate": """Score a trained checkpoint on its validation images.
  python -m digitnet validate                        the newest run's best checkpoint
  python -m digitnet validate --ckpt_path FILE.ckpt
Data and model settings are those of the checkpoint's run; flags given here come on top.""",
    "test": """Score a trained checkpoint on its test images, each once.
  python -m digitnet test                            the newest run's best checkpoint
  python -m digitnet test --ckpt_path FILE.ckpt
Writes metrics.json, predictions.csv and a page with figures, report.html, into the run's report/ folder. Data and model
settings are those of the checkpoint's run; flags given here come on top.""",
}


class DigitParser(OneLineErrors, LightningArgumentParser):
    """LightningCLI's parser, with one-line errors, and flags written out in full."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, allow_abbrev=False, **kwargs)


class PathFinder(OneLineErrors, argparse.ArgumentParser):
    """Reads ``--ckpt_path`` ahead of everything else."""


class DigitCLI(LightningCLI):
    """LightningCLI for DigitClassifier on MNISTDataModule.

    Args:
        args: the subcommand (fit, validate or test) and its flags.

    Raises:
        ValueError, OSError: a setting, a file or the data is wrong; one line says which and what to do.
    """

    def __init__(self, args: list[str]) -> None:
        self.args = args
        self.command = tell_command(*args)
        self.origin = Origin()
        self.stop = StopCleanly()
        try:
            super().__init__(
                DigitClassifier,
                MNISTDataModule,
                args=args,
                parser_class=DigitParser,
                auto_configure_optimizers=False,
                save_config_callback=SaveConfig,
                save_config_kwargs={"save_to_log_dir": False},
                seed_everything_default=42,
                trainer_defaults={
                    "max_epochs": 200,
                    "num_sanity_val_steps": 0,
                    "enable_autolog_hparams": False,  # HyperparameterSummary logs more of them
                    "logger": {
                        "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
                        "init_args": {"save_dir": str(LOG_DIR), "name": "digitnet", "default_hp_metric": False},
                    },
                },
                parser_kwargs={
                    "formatter_class": HelpFormatter,
                    args[0]: {"description": DESCRIPTIONS[args[0]], "usage": USAGE.format(args[0])},
                },
            )
        except MisconfigurationException as error:  # how Lightning refuses what this machine has not, such as a GPU
            raise ValueError(str(error)) from error

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(RunEarlyStopping, "early_stopping")
        parser.add_lightning_class_args(RunCheckpoint, "best_checkpoint")
        parser.add_lightning_class_args(RunCheckpoint, "last_checkpoint")
        parser.add_lightning_class_args(Pictures, "pictures")
        parser.add_lightning_class_args(Calibrate, "calibration")
        best = {"monitor": "val/acc", "mode": "max", "save_weights_only": True, **FIXED["best_checkpoint"]}
        last = FIXED["last_checkpoint"]  # not ModelCheckpoint's save_last: that is written only when a best one is
        # Not strict: a run cut short by max_steps has no validation accuracy, and should still end well.
        stop = {"monitor": "val/acc", "mode": "max", "patience": 10, "strict": False}
        for key, defaults in (("early_stopping", stop), ("best_checkpoint", best), ("last_checkpoint", last)):
            parser.set_defaults({f"{key}.{name}": value for name, value in defaults.items()})

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]  # static there, as it names them all
        """The one that was typed: a parser takes a tenth of a second to build."""
        return {self.args[0]: LightningCLI.subcommands()[self.args[0]] | {"verbose", "weights_only"}}

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Put the settings of the checkpoint's run before what was typed, as if typed first."""
        subcommand, *flags = args
        finder = PathFinder(add_help=False, allow_abbrev=False)
        finder.add_argument("--ckpt_path", default=None if subcommand == "fit" else "best")
        finder.add_argument("-c", "--config", action="append")
        typed = finder.parse_known_args(flags)[0]
        for path in typed.config or []:
            verify_is_text(Path(path))
        ckpt_path = typed.ckpt_path
        is_shown = any(flag.startswith("--print_config") or flag.partition("=")[0].endswith(".help") for flag in flags)
        if ckpt_path is not None and not {"-h", "--help"} & set(flags):
            try:
                self.origin = choose_origin(ckpt_path, to_resume=subcommand == "fit")
            except FileNotFoundError:
                if not is_shown:  # what only shows settings needs no run
                    raise
        if (origin := self.origin).checkpoint:
            if subcommand == "fit" and not (origin.run_dir or typed.config):
                raise ValueError(
                    f"{origin.checkpoint} lies outside a run: give the config it was trained with, --config"
                )
            flags = [*origin.to_flags(to_resume=subcommand == "fit"), *flags]
            rank_zero_info(f"{subcommand}: {origin.checkpoint}")
            if origin.run_dir and typed.config:
                rank_zero_info(f"{', '.join(typed.config)}: on top of the settings of {origin.run_dir}")
        self.config = parser.parse_args([subcommand, *flags])
        config = self.config[subcommand]
        verify_sections(config, self._parser(subcommand).get_defaults())
        if not 0 <= (seed := config.get("seed_everything") or 0) < 2**32:
            raise ValueError(f"seed_everything is {seed}; it must be from 0 to 2**32 - 1")
        configured = config.get("ckpt_path")
        if configured and str(configured) != ckpt_path:  # read too late to find the run by it
            raise ValueError(f"a config has ckpt_path: {configured}; give it as a flag, --ckpt_path")
        if self.origin.checkpoint:
            config.ckpt_path = str(self.origin.checkpoint)
        if subcommand == "fit":
            self.origin.verify_recipe(parser, config)

    def _parse_ckpt_path(self) -> None:
        """Do nothing: Lightning would let the checkpoint's hyper-parameters override what was typed."""

    def before_instantiate_classes(self) -> None:
        config = self.config[self.subcommand]
        if self.subcommand != "fit":
            warnings.filterwarnings("ignore", message="Be aware that when using `ckpt_path`")  # the callbacks of fit
            warnings.filterwarnings("ignore", message="You're using the WeightAveraging")  # the averages are scored
            for name, value in LEFT_OUT.items():
                config.trainer[name] = value
            flags = [arg.partition("=")[0] for arg in self.args]
            if typed := [flag for flag in flags if flag.startswith("--trainer.") and flag.split(".")[1] in LEFT_OUT]:
                rank_zero_info(f"{', '.join(typed)}: left out, as every image is scored and nothing logged")
            self.save_config_callback = None
            # They have done their work; the teacher's file may be gone.
            config.model.teacher = config.model.selection = None
            return
        verify_settings(config)
        if config.trainer.logger is None or config.trainer.logger is True:  # Lightning's words for one of TensorBoard's
            config.trainer.logger = self._parser("fit").get_defaults().trainer.logger
        prepare_loggers(config, self.origin.run_dir)
        if config.trainer.logger is False:
            self.save_config_callback = None  # there is no folder for it
            kept = Path(config.trainer.default_root_dir or ".", "checkpoints", "last.ckpt")
            if kept.exists() and not self.origin.checkpoint and not config.trainer.fast_dev_run:
                raise ValueError(f"without a logger this run would replace {kept}; move it, or leave the logger in")

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        settings = self._get(self.config_init, "trainer")
        callbacks = settings.callbacks or []
        callbacks = list(callbacks) if isinstance(callbacks, list) else [callbacks]
        watched = any(isinstance(callback, ProgressBar) for callback in callbacks)
        is_wanted = settings.enable_progress_bar
        if not watched and (sys.stdout.isatty() if is_wanted is None else is_wanted):
            callbacks.append(TQDMProgressBar())
            watched = True
        plugins = settings.plugins or []
        plugins = plugins if isinstance(plugins, list) else [plugins]
        if settings.precision is None and not any(isinstance(plugin, Precision) for plugin in plugins):
            kwargs["precision"], reason = choose_precision(settings.accelerator)
            rank_zero_info(f"precision {kwargs['precision']}: {reason} (--trainer.precision overrides)")
            if self.subcommand == "fit" and self.origin.run_dir:
                with contextlib.suppress(ValueError):  # the run does not say
                    before = read_precision(self.origin.run_dir)
                    if before != kwargs["precision"]:
                        rank_zero_info(
                            f"{self.origin.run_dir} began in {before}, which --trainer.precision {before} keeps"
                        )
        if self.subcommand == "fit":
            config = self.config["fit"]
            own = [one for one in callbacks if not isinstance(one, ProgressBar)]
            summary = summarize(config, kwargs.get("precision", settings.precision), own)
            config.ckpt_path = None  # config.yaml describes a run, not this call; with it, a new one can be started
            if self.origin.run_dir:
                find_first_logger(config).init_args.version = None
            configured = {key: self._get(self.config_init, key) for key in self._parser("fit").callback_keys}
            calibrate = configured.pop("calibration")
            callbacks += configured.values()
            is_new_run = not self.origin.run_dir
            configured["pictures"].is_new_run = is_new_run
            callbacks += [SeedEachEpoch(), StopOnNaN(), Throughput(), StepLoss()]
            callbacks.append(HyperparameterSummary(summary, is_new_run))
            callbacks += [self.stop, RestoreBestWeights(), calibrate]
            if settings.logger is not False:
                is_scheduled = config.model.lr_scheduler is not None  # then every 50 steps, where it steps so often
                callbacks.append(LearningRateMonitor(None if is_scheduled else "epoch"))
            callbacks.append(PrintEpochs())
        else:
            origin = self.origin
            assert origin.checkpoint is not None
            folder = find_report_folder(origin.checkpoint, origin.trained_on, self.config[self.subcommand].data.source)
            self.tested_folder = folder
            if origin.run_dir and folder == find_folder(origin.checkpoint, "report"):
                self.tested_folder = origin.run_dir
            callbacks.append(WriteScores(origin.checkpoint, folder, self.command))
        kwargs["plugins"] = [*plugins, WholeCheckpointIO()]
        kwargs["enable_progress_bar"] = watched
        try:
            return self._instantiate_trainer({**settings, "callbacks": callbacks, **kwargs}, [])
        except (TypeError, RuntimeError, ImportError, ArithmeticError) as error:  # how Lightning refuses some values
            raise ValueError(f"trainer: {error}") from error

    def fit(self, model: DigitClassifier, **kwargs: Any) -> None:
        # Data, optimizer and log folder first: where one of them is wrong, no half-made run is left behind.
        self.datamodule.trainer = self.trainer  # which knows how many processes share the data
        self.datamodule.setup("fit")
        verify_unseen("model.teacher", getattr(model.teacher, "data_settings", {}), self.datamodule)
        self.origin.verify_data(self.datamodule)
        if self.datamodule.augmentation is not None:
            images = self.datamodule.datasets[0].images[:8]
            verify_augmentation(self.datamodule.augmentation, images.to(self.trainer.strategy.root_device))
        first_step = self.origin.begun.num_steps if self.origin.begun else 0
        verify_limits(self.trainer, self.datamodule)
        verify_optimization(self.trainer, model, self.datamodule, self.origin.begun)
        self.origin.verify_model(model, self.trainer.max_epochs)
        with contextlib.ExitStack() as stack:
            for logger in self.trainer.loggers:
                if isinstance(logger, TensorBoardLogger) and self.trainer.is_global_zero:
                    stack.enter_context(claim_folder(logger, to_go_on=self.origin.run_dir is not None))
                    if self.origin.run_dir:
                        # TensorBoard forgets what a killed run logged after the checkpoint: it is logged again.
                        logger._kwargs["purge_step"] = first_step
            stack.enter_context(explain_failures(self.trainer))
            try:
                self.trainer.fit(model, **kwargs, weights_only=True)
            except SystemExit:  # how Lightning ends after Ctrl-C
                if self.trainer.interrupted:
                    sys.exit(143 if self.stop.terminated else 130)
                raise
        if self.trainer.global_step == first_step:
            rank_zero_info(
                "nothing was trained: the limits leave no step, or the run had ended already; a larger "
                "--trainer.max_epochs goes on"
            )
        best = find_keeper(self.trainer, of_best=True)
        if best and not best.best_model_path and not self.config["fit"].trainer.fast_dev_run:
            rank_zero_info(
                "no epoch was validated, so there is no best.ckpt, and test would take another run's; see "
                "trainer.check_val_every_n_epoch, max_steps and limit_val_batches"
            )

    def validate(self, model: DigitClassifier, **kwargs: Any) -> None:
        self._score(self.trainer.validate, 1, model, **kwargs)

    def test(self, model: DigitClassifier, **kwargs: Any) -> None:
        self._score(self.trainer.test, 2, model, **kwargs)

    def _score(self, run: Callable[..., Any], part: int, model: DigitClassifier, **kwargs: Any) -> None:
        """Score a part of the split, the second or the third; say so where some of it was trained on."""
        start, num_images = sum(self.datamodule.split[:part]), self.datamodule.split[part]
        if known := count_trained_on(self.origin.trained_on, self.datamodule.source, start, num_images):
            rank_zero_info(f"the checkpoint was trained on {known:,} of these {num_images:,} images: it knows them")
        try:
            with explain_failures(self.trainer):
                run(model, **kwargs, verbose=False, weights_only=True)
        except SystemExit as stop:  # how Lightning ends after Ctrl-C
            if self.trainer.interrupted:
                raise KeyboardInterrupt from stop
            raise


def summarize(config: Any, precision: Any, callbacks: list[L.Callback]) -> dict[str, Any]:
    """What TensorBoard's table of runs compares them by: settings of ``fit`` and the user's own callbacks."""
    return {
        "seed": config.seed_everything,
        "precision": precision,
        **config.model.as_dict(),
        **config.data.as_dict(),
        **{name: config.trainer[name] for name in SUMMARIZED},
        "patience": config.early_stopping.patience,
        "best_by": config.best_checkpoint.monitor,
        **{type(one).__name__: getattr(one, "decay", True) for one in callbacks},
    }


def hide_noise() -> None:
    """Filter out what is not for our users: a summary's remark on bfloat16, the like, and advertisements."""
    warnings.filterwarnings("ignore", message=".*does not have many workers")
    warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")  # going on with a run
    warnings.filterwarnings("ignore", message="ReduceLROnPlateau conditioned on .* Skipping learning rate update")
    warnings.filterwarnings("ignore", message="Precision .* is not supported by the model summary")
    warnings.filterwarnings("ignore", message=".*LeafSpec.* is deprecated", category=FutureWarning)
    warnings.filterwarnings("ignore", message="The number of training batches .* is smaller than the logging interval")
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: not any(noise in record.getMessage() for noise in ("Tip:", "Loading `train_dataloader`"))
    )


def main(args: list[str], cli_class: type[DigitCLI] = DigitCLI) -> DigitCLI:
    """Run ``fit``, ``validate`` or ``test``.

    Args:
        args: the subcommand and its flags.
        cli_class: what runs it.

    Returns:
        The command line after its work, with its ``model`` and ``trainer``.

    Raises:
        ValueError, OSError: a setting, a file or the data is wrong; one line says which and what to do.
    """
    hide_noise()
    limit_imports()
    register_type(torch.device)  # StochasticWeightAveraging has one
    keep_freed_memory()
    with choose_once():
        cli = cli_class(args)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        # Gloo's threads can abort a process that ends before they do (github.com/pytorch/pytorch/pull/179291).
        torch.distributed.destroy_process_group()
    return cli
