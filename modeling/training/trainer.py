"""transformers' Trainer with what DLO adds to a step: selection, labels, losses, capacities, learning rates."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import AutocastKwargs, broadcast_object_list
from safetensors import SafetensorError
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, TrainerState

from dlo_export.checkpoints.errors import MachineError
from dlo_export.checkpoints.files.disk_space import check_disk_space
from dlo_export.checkpoints.files.json_file import read_json, save_json
from dlo_export.checkpoints.files.whole_folder import whole_folder
from dlo_export.modeling.llama_dlo import LlamaDloForCausalLM
from dlo_export.modeling.training.distillation import distillation_loss
from dlo_export.modeling.training.divergence import MicroBatch, first_bad_gradient, first_bad_layer
from dlo_export.modeling.training.errors import TrainingDivergedError, TrainingError
from dlo_export.modeling.training.measuring import Measuring
from dlo_export.modeling.training.packing import PackedSets, stacked
from dlo_export.modeling.training.parameters import parameter_groups
from dlo_export.modeling.training.reports import HeldOut, StepReport
from dlo_export.modeling.training.run_folder import CAPACITIES_NAME, RunFolder
from dlo_export.modeling.training.selection import training_routing
from dlo_export.modeling.training.settings import TrainingSettings
from dlo_export.modeling.training.sharding import configure_sharding, shard_on_cpus, whole
from dlo_export.modeling.training.skip_loss import router_losses, skip_labels
from dlo_export.modeling.training.zero import configure_zero

_SLACK_BYTES = 1 << 20
_STATE_NAME = "trainer_state.json"
_SUMS = 8  # language loss, distillation loss, tokens, micro-batches, skip loss, rate loss, active, selected


class DloTrainer(Trainer):
    """Trains a routed (or dense) model; everything else is transformers' and Accelerate's.

    A step's capacities are each layer's share of active labels among the tokens of all micro-batches of all processes,
    where one with little padding counts for more than one with much; so they do not depend on how labelled tokens are
    divided among them. Selection and labels are made per micro-batch.

    Args:
        model: Its parameters that are to learn are chosen.
        settings: Of the run.
        arguments: transformers', which the settings were translated into.
        teacher: Whose next tokens the model's are to be like; None for no distillation.
        data: To learn from and to measure on.
        folder: Where checkpoints go.
        report: Called after each step, in the main process.
        should_stop: Asked after each step; saves and ends the run.

    Attributes:
        capacities: By routed layer, the share of tokens that training selects.
        stopped: Whether `should_stop` ended the run.
        measuring: What measures the model.
        measured: The last evaluation; each run that comes to its end ends with one.
    """

    def __init__(
        self,
        model: LlamaDloForCausalLM,
        settings: TrainingSettings,
        arguments: TrainingArguments,
        *,
        teacher: nn.Module | None,
        data: PackedSets,
        folder: RunFolder,
        report: Callable[[StepReport], None],
        should_stop: Callable[[], bool],
    ) -> None:
        self.settings = settings
        self.folder = folder
        self.capacities = dict.fromkeys(model.config.routed_layers, settings.rate(0))
        self.stopped = False
        self.measured: HeldOut | None = None
        self._routed = model
        self._teacher = teacher
        self._report = report
        self._micro_batches: list[MicroBatch] = []
        self._should_stop = should_stop
        self._sums = self._found = torch.zeros(0)
        self._step_started = 0.0
        super().__init__(
            model=model,
            args=arguments,
            train_dataset=data.training,
            eval_dataset=data.held_out,
            data_collator=stacked,
            callbacks=[_StepCallback(self)],
        )
        self.remove_callback(PrinterCallback)  # stdout is data
        # What compute_loss returns is normalised over the whole step: by tokens, and by micro-batches.
        self.loss_is_scaled_for_ga = True
        if self._teacher is not None:
            self._teacher.to(self.args.device)
        self.measuring = Measuring(
            model,
            settings,
            data,
            self.accelerator,
            autocast=self._autocast,
            training_routing=self._training_routing,
        )

    def create_accelerator_and_postprocess(self) -> None:
        """Sees to it that what was launched to be sharded is; the Trainer calls it."""
        super().create_accelerator_and_postprocess()
        shard_on_cpus(self.accelerator)
        self.is_fsdp_enabled = self.accelerator.is_fsdp2
        if self.is_fsdp_enabled:
            configure_sharding(self.accelerator, self._routed)
        if self.is_deepspeed_enabled:
            configure_zero(self.accelerator, self._routed, self.settings)

    # A step, in the order of events.

    def begin_step(self) -> None:
        """Forgets the last step's sums and micro-batches, and gives each layer its share of the learning rate."""
        self._micro_batches.clear()
        self._sums = torch.zeros(_SUMS + len(self.capacities), dtype=torch.float64, device=self.args.device)
        self._step_started = time.perf_counter()
        self._scale_learning_rates()

    def _scale_learning_rates(self) -> None:
        """By the capacities of the step before; the scheduler sets the rates anew when the step is done."""
        if not (self.settings.layer_wise and self.capacities):
            return
        assert self.optimizer is not None, "this comes before its step"
        mean = sum(self.capacities.values()) / len(self.capacities)
        for group in self.optimizer.param_groups:
            if group["layer"] in self.capacities:
                group["lr"] *= self.capacities[group["layer"]] + 1 - mean

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The loss of a micro-batch: language, skip labels, rate. Nothing here waits for a GPU, but for a teacher's."""
        counted = inputs.pop("counted")
        rate = self.settings.rate(self.state.global_step)
        routing = self._training_routing(counted)
        with self._autocast():
            outputs = model(**inputs, **routing, use_cache=False, num_items_in_batch=num_items_in_batch)
        language = outputs.loss
        self._micro_batches.append(MicroBatch(inputs, routing, language.detach()))
        # Gradients are averaged over processes and summed over micro-batches; `language` is divided by all tokens.
        loss = self.settings.language_weight * language * self.accelerator.num_processes
        distilled = torch.zeros_like(language)
        assert num_items_in_batch is not None, "the Trainer counts the labels of a model that takes their number"
        if self._teacher is not None:
            with torch.no_grad(), self._autocast():
                values = {name: value for name, value in inputs.items() if name != "labels"}
                wanted = self._teacher(**values, use_cache=False).logits
            distilled = distillation_loss(outputs.logits, wanted, inputs["labels"]) / num_items_in_batch
            loss = loss + self.settings.distill_weight * distilled * self.accelerator.num_processes
        ones = counted.new_ones((), dtype=torch.float64)
        parts = [language.detach().double(), distilled.detach().double(), counted.sum().double(), ones]
        routers = [torch.zeros(4 + len(self.capacities), dtype=torch.float64, device=counted.device)]
        if self.capacities:
            labels = skip_labels(self.settings.labels, outputs.training_routing, counted, rate)
            losses = router_losses(outputs.training_routing, labels, counted, rate, self._routed.config.thresholds)
            weighted = self.settings.skip_weight * losses.skip + self.settings.rate_weight * losses.rate
            loss = loss + weighted / self.current_gradient_accumulation_steps
            found = (losses.skip.detach(), losses.rate.detach(), losses.active, losses.selected)
            routers = [torch.stack([value.double() for value in found]), losses.labelled.double()]
        self._sums += torch.cat([torch.stack(parts), *routers])
        if self.is_deepspeed_enabled and self.accelerator.sync_gradients:
            self._check_losses()
        return (loss, outputs) if return_outputs else loss

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        """Clips, and has a step left out where a loss or a gradient is not finite: it would spoil the weights.

        A fused optimiser is told so on its device: the host goes on, and `check_step` asks once the step is on its way.

        Raises:
            TrainingDivergedError: One is not finite, and the optimiser cannot be told.
        """
        assert self.optimizer is not None, "this comes before its step"
        if self.is_deepspeed_enabled:  # which has clipped by itself, and taken the step
            engine: Any = model
            self._found = torch.tensor([float(engine.get_global_grad_norm()), 0.0], dtype=torch.float64)
            self.check_step()
            return self._found[0]
        learning = [*self._routed.parameters()]
        norm = torch.nn.utils.get_total_norm([each.grad for each in learning if each.grad is not None])
        # A finite gradient is no proof: softmax has one where its logits overflow. No router's loss is large.
        losses = torch.stack([batch.loss for batch in self._micro_batches]).sum()
        found = torch.stack([whole(norm).double(), losses.double()])
        self._found = self.accelerator.reduce(found, "sum")
        optimizer: Any = getattr(self.optimizer, "optimizer", self.optimizer)  # Accelerate's is around PyTorch's
        if optimizer.defaults.get("fused") and not self.is_fsdp_enabled:
            is_finite = self._found.isfinite().all()
            optimizer.found_inf = (~is_finite).float()
            norm = torch.where(is_finite, norm, 0.0)  # else clipping makes every gradient NaN where one is
        else:
            self.check_step()
        torch.nn.utils.clip_grads_with_norm_(learning, self.settings.max_grad_norm, norm)
        return norm

    def _check_losses(self) -> None:
        """Raises TrainingDivergedError before the step's last backward pass, which takes DeepSpeed's step."""
        losses = torch.stack([batch.loss for batch in self._micro_batches]).sum().double()
        self._found = torch.stack([torch.zeros_like(losses), self.accelerator.reduce(losses, "sum")])
        self.check_step()

    def check_step(self) -> None:
        """Waits for a step's loss and gradient.

        Raises:
            TrainingDivergedError: One is not finite; the weights are as before the step.
        """
        gradient_is_finite, loss_is_finite = self._found.isfinite().tolist()
        if not loss_is_finite:
            where = first_bad_layer(self._routed, self._micro_batches, self.accelerator, self._autocast)
            raise self._diverged("the loss", where)
        if not gradient_is_finite:
            is_zero = self.is_deepspeed_enabled
            where = "DeepSpeed does not say of which weight" if is_zero else first_bad_gradient(self._routed)
            raise self._diverged("the gradient", where)

    def end_step(self) -> None:
        """Takes over the step's capacities, logs it, and stops if that is wished for."""
        stop = torch.tensor([float(self._should_stop())], dtype=torch.float64, device=self.args.device)
        sums = self.accelerator.reduce(torch.cat([self._sums, stop]), "sum").tolist()
        language, distilled, tokens, micro_batches, skip, rate, active, selected = sums[:_SUMS]
        skip, rate = skip / micro_batches, rate / micro_batches
        # Of numbers of tokens, which are summed without rounding.
        active, selected = (value / (tokens * max(1, len(self.capacities))) for value in (active, selected))
        labelled = [value / tokens for value in sums[_SUMS:-1]]
        wanted = self.settings.rate(self.state.global_step)
        if self.settings.labels == "cos-global":
            self.capacities = dict(zip(self.capacities, labelled, strict=True))
        else:
            self.capacities = dict.fromkeys(self.capacities, wanted)
        speed = tokens / (time.perf_counter() - self._step_started)
        entry = {"loss": language, "learning_rate": self._get_learning_rate(), "tokens_per_second": speed}
        if self._teacher is not None:
            entry["distill_loss"] = distilled
        if self.capacities:
            entry |= {
                "skip_loss": skip,
                "rate_loss": rate,
                "target": wanted,
                "active": active,
                "selected": selected,
            }
        self.log(entry)
        if self.is_world_process_zero():
            shown = active if self.capacities else None
            self._report(StepReport(self.state.global_step, self.state.max_steps, language, shown, speed))
        if sums[-1] > 0 and self.state.global_step < self.state.max_steps:
            self.stopped = self.control.should_training_stop = self.control.should_save = True

    # Evaluation.

    def evaluate(self, *_arguments: Any, **_options: Any) -> dict[str, float]:
        """Measures on held-out text and logs it; the Trainer calls it."""
        self.measured = result = self.measuring.measure()
        metrics = {"eval_loss": result.loss, "eval_perplexity": result.perplexity}
        if result.active_rate is not None:
            metrics |= {"eval_active": result.active_rate, "eval_training_loss": result.training_loss}
            metrics |= {f"eval_active_{layer}": rate for layer, rate in result.active.items()}
        self.log(dict(metrics))
        return metrics

    def _autocast(self) -> AbstractContextManager[None]:
        """Accelerate puts its own around a model that it wraps, and none around a sharded one."""
        if self.is_deepspeed_enabled:
            return nullcontext()  # the model's own forward has it
        # A cache of casts would hold the 16-bit copy of every weight that shards are gathered into, all at once.
        casts = AutocastKwargs(cache_enabled=not self.is_fsdp_enabled)
        context: AbstractContextManager[None] = self.accelerator.autocast(casts)
        return context

    def _training_routing(self, counted: torch.Tensor) -> dict[str, Any]:
        step, thresholds = self.state.global_step, self._routed.config.thresholds
        return training_routing(self.settings, step, self.capacities, thresholds, counted)

    # Learning rates and checkpoints, in place of the Trainer's.

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW over the groups of `parameter_groups`."""
        if self.optimizer is None:
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, self._routed)
            options["weight_decay"] = self.args.weight_decay  # AdamW has one of its own
            self.optimizer = kind(parameter_groups(self._routed, self.settings), **options)
        return self.optimizer

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Restores both, as the Trainer does.

        Raises:
            TrainingError: The checkpoint divides the parameters otherwise, as earlier versions did.
        """
        try:
            super()._load_optimizer_and_scheduler(checkpoint)
        except ValueError as err:  # PyTorch's optimisers, of a state that is not theirs
            raise TrainingError(
                f"{checkpoint}: its optimiser has other groups of parameters than layer_wise "
                f"{self.settings.layer_wise} makes of this model: {err}",
                hint="finish the run with the version that began it, or start another from what it has saved",
            ) from err

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Writes a checkpoint whole or not at all, so that whatever happens the last good one is there.

        Raises:
            MachineError: The disk is full, or refuses.
        """
        folder = self.folder.checkpoint(self.state.global_step)
        try:
            if self.is_world_process_zero():
                check_disk_space(self.folder.path, self._checkpoint_bytes(), folder, "a checkpoint needs")
                with whole_folder(folder) as staging:
                    broadcast_object_list([str(staging)])
                    self._fill_checkpoint(staging)
                self.folder.remove_old_checkpoints()
            else:
                places = [""]
                broadcast_object_list(places)
                self._fill_checkpoint(Path(places[0]))
        except (OSError, RuntimeError, SafetensorError) as err:
            # PyTorch says RuntimeError where a write fails, and of positions in its file instead of the reason.
            reason = f"a file could not be written whole ({err})" if isinstance(err, RuntimeError) else err
            raise MachineError(
                f"{folder}: the checkpoint cannot be written: {reason}",
                hint="free some space, lift the limit or allow the writing, then go on with --resume from "
                f"{self._last_checkpoint_shown()}",
            ) from err

    def _fill_checkpoint(self, folder: Path) -> None:
        if not self.is_deepspeed_enabled:  # whose own checkpoint, with the optimiser's, has the weights
            self.save_model(str(folder), _internal_call=True)
        self._save_optimizer_and_scheduler(str(folder))
        self._save_rng_state(str(folder))
        if self.is_world_process_zero():
            self.state.save_to_json(str(folder / _STATE_NAME))
            save_json(folder / CAPACITIES_NAME, {str(layer): share for layer, share in self.capacities.items()})
        # Nobody's file may be missing when the folder gets its name.
        self.accelerator.wait_for_everyone()

    def train_from(self, checkpoint: Path | None) -> None:
        """Trains on from a checkpoint, or from the beginning; a checkpoint of the last step is only loaded."""
        if checkpoint is None:
            self.train()
            return
        stored: Mapping[str, float] = read_json(checkpoint / CAPACITIES_NAME)
        self.capacities = {int(layer): share for layer, share in stored.items()}
        state = TrainerState.load_from_json(str(checkpoint / _STATE_NAME))
        if state.global_step < state.max_steps:
            self.train(resume_from_checkpoint=str(checkpoint))
        else:  # the Trainer would do one step more
            self.state = state
            if self.is_deepspeed_enabled:
                self._prepare_for_training(state.max_steps, self.get_train_dataloader(), str(checkpoint))
                return
            if self.is_fsdp_enabled:  # whose checkpoints are of shards
                self.model, self.optimizer = self.accelerator.prepare(self.model, self.create_optimizer())
            self._load_from_checkpoint(str(checkpoint))

    def _checkpoint_bytes(self) -> int:
        sizes = [(p.numel() * p.element_size(), p.requires_grad) for p in self._routed.parameters()]
        return sum(size * (3 if learns else 1) for size, learns in sizes) + _SLACK_BYTES

    def _last_checkpoint_shown(self) -> str:
        last = self.folder.last_checkpoint()
        return "the beginning" if last is None else last.name

    # What went wrong, and where.

    def _diverged(self, what: str, where: str) -> TrainingDivergedError:
        return TrainingDivergedError(
            f"training: {what} of step {self.state.global_step + 1} is not a finite number: {where}",
            hint=f"lower the learning rate; {self._last_checkpoint_shown()} in {self.folder.path} is intact",
        )


class _StepCallback(TrainerCallback):
    """Calls the trainer at the moments of a step that it cannot override."""

    def __init__(self, trainer: DloTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            self._trainer.folder.save_log(state.log_history)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._trainer.begin_step()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._trainer.check_step()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._trainer.end_step()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        # Both were done after the epoch's last step, and nothing happened since.
        control.should_evaluate = control.should_save = False

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if state.is_world_process_zero and "train_runtime" not in logs:  # the Trainer's own summary
            self._trainer.folder.log(state.log_history[-1])
