"""The public names, for type checkers and editors; `_MODULES` in `__init__.py` has the same."""

from inlay.core.config import PeftType as PeftType
from inlay.core.config import TaskType as TaskType
from inlay.core.errors import UserError as UserError
from inlay.methods._starts import BdLoraConfig as BdLoraConfig
from inlay.methods._starts import CordaConfig as CordaConfig
from inlay.methods._starts import EvaConfig as EvaConfig
from inlay.methods._starts import KasaConfig as KasaConfig
from inlay.methods._starts import LoftQConfig as LoftQConfig
from inlay.methods._starts import LoraGAConfig as LoraGAConfig
from inlay.methods.adalora import AdaLoraConfig as AdaLoraConfig
from inlay.methods.adamss import AdamssConfig as AdamssConfig
from inlay.methods.adaption_prompt import AdaptionPromptConfig as AdaptionPromptConfig
from inlay.methods.beft import BeftConfig as BeftConfig
from inlay.methods.bitfit import BitfitConfig as BitfitConfig
from inlay.methods.boft import BOFTConfig as BOFTConfig
from inlay.methods.bottleneck import BottleneckConfig as BottleneckConfig
from inlay.methods.c3a import C3AConfig as C3AConfig
from inlay.methods.cartridge import CartridgeConfig as CartridgeConfig
from inlay.methods.cpt import CPTConfig as CPTConfig
from inlay.methods.deft import DeftConfig as DeftConfig
from inlay.methods.delora import DeloraConfig as DeloraConfig
from inlay.methods.fourierft import FourierFTConfig as FourierFTConfig
from inlay.methods.frod import FrodConfig as FrodConfig
from inlay.methods.glora import GloraConfig as GloraConfig
from inlay.methods.gralora import GraloraConfig as GraloraConfig
from inlay.methods.hira import HiraConfig as HiraConfig
from inlay.methods.hra import HRAConfig as HRAConfig
from inlay.methods.ia3 import IA3Config as IA3Config
from inlay.methods.lily import LilyConfig as LilyConfig
from inlay.methods.ln_tuning import LNTuningConfig as LNTuningConfig
from inlay.methods.loha import LoHaConfig as LoHaConfig
from inlay.methods.lokr import LoKrConfig as LoKrConfig
from inlay.methods.lora import LoraConfig as LoraConfig
from inlay.methods.miss import MissConfig as MissConfig
from inlay.methods.multitask_prompt_tuning import (
    MultitaskPromptTuningConfig as MultitaskPromptTuningConfig,
)
from inlay.methods.oft import OFTConfig as OFTConfig
from inlay.methods.osf import OSFConfig as OSFConfig
from inlay.methods.p_tuning import PromptEncoderConfig as PromptEncoderConfig
from inlay.methods.peanut import PeanutConfig as PeanutConfig
from inlay.methods.poly import PolyConfig as PolyConfig
from inlay.methods.prefix_tuning import PrefixTuningConfig as PrefixTuningConfig
from inlay.methods.prompt_tuning import PromptTuningConfig as PromptTuningConfig
from inlay.methods.psoft import PsoftConfig as PsoftConfig
from inlay.methods.pvera import PveraConfig as PveraConfig
from inlay.methods.randlora import RandLoraConfig as RandLoraConfig
from inlay.methods.road import RoadConfig as RoadConfig
from inlay.methods.shira import ShiraConfig as ShiraConfig
from inlay.methods.supertuning import SupertuningConfig as SupertuningConfig
from inlay.methods.tinylora import TinyLoraConfig as TinyLoraConfig
from inlay.methods.trainable_tokens import TrainableTokensConfig as TrainableTokensConfig
from inlay.methods.unilora import UniLoraConfig as UniLoraConfig
from inlay.methods.vblora import VBLoRAConfig as VBLoRAConfig
from inlay.methods.vera import VeraConfig as VeraConfig
from inlay.methods.waveft import WaveFTConfig as WaveFTConfig
from inlay.methods.xlora import XLoraConfig as XLoraConfig
from inlay.model.load import load_base as load_base
from inlay.objectives.tokens import causal_lm_loss as causal_lm_loss
from inlay.run import Run as Run
from inlay.run import train as train
from inlay.surface.auto import AutoPeftModel as AutoPeftModel
from inlay.surface.auto import AutoPeftModelForCausalLM as AutoPeftModelForCausalLM
from inlay.surface.auto import (
    AutoPeftModelForFeatureExtraction as AutoPeftModelForFeatureExtraction,
)
from inlay.surface.auto import (
    AutoPeftModelForQuestionAnswering as AutoPeftModelForQuestionAnswering,
)
from inlay.surface.auto import AutoPeftModelForSeq2SeqLM as AutoPeftModelForSeq2SeqLM
from inlay.surface.auto import (
    AutoPeftModelForSequenceClassification as AutoPeftModelForSequenceClassification,
)
from inlay.surface.auto import (
    AutoPeftModelForTokenClassification as AutoPeftModelForTokenClassification,
)
from inlay.surface.config import PeftConfig as PeftConfig
from inlay.surface.config import get_peft_config as get_peft_config
from inlay.surface.fast import fast as fast
from inlay.surface.functions import convert_to_lora as convert_to_lora
from inlay.surface.functions import extract_lora as extract_lora
from inlay.surface.functions import get_peft_model_state_dict as get_peft_model_state_dict
from inlay.surface.functions import hotswap_adapter as hotswap_adapter
from inlay.surface.functions import inject_adapter_in_model as inject_adapter_in_model
from inlay.surface.functions import (
    prepare_model_for_compiled_hotswap as prepare_model_for_compiled_hotswap,
)
from inlay.surface.functions import save_as_lora as save_as_lora
from inlay.surface.functions import set_peft_model_state_dict as set_peft_model_state_dict
from inlay.surface.loftq import replace_lora_weights_loftq as replace_lora_weights_loftq
from inlay.surface.past import compose_cartridge_adapters as compose_cartridge_adapters
from inlay.surface.past import (
    initialize_kv_prefix_from_past_key_values as initialize_kv_prefix_from_past_key_values,
)
from inlay.surface.past import initialize_kv_prefix_from_text as initialize_kv_prefix_from_text
from inlay.surface.peft_model import PeftModel as PeftModel
from inlay.surface.prepare import prepare_model_for_kbit_training as prepare_model_for_kbit_training
from inlay.surface.starts import get_eva_state_dict as get_eva_state_dict
from inlay.surface.starts import initialize_lora_eva_weights as initialize_lora_eva_weights
from inlay.surface.starts import preprocess_corda as preprocess_corda
from inlay.surface.starts import preprocess_loraga as preprocess_loraga
from inlay.surface.tasks import PeftModelForCausalLM as PeftModelForCausalLM
from inlay.surface.tasks import PeftModelForFeatureExtraction as PeftModelForFeatureExtraction
from inlay.surface.tasks import PeftModelForQuestionAnswering as PeftModelForQuestionAnswering
from inlay.surface.tasks import PeftModelForSeq2SeqLM as PeftModelForSeq2SeqLM
from inlay.surface.tasks import (
    PeftModelForSequenceClassification as PeftModelForSequenceClassification,
)
from inlay.surface.tasks import PeftModelForTokenClassification as PeftModelForTokenClassification
from inlay.surface.tasks import get_peft_model as get_peft_model
from inlay.train.makers import create_lorafa_optimizer as create_lorafa_optimizer
from inlay.train.makers import create_loraplus_optimizer as create_loraplus_optimizer
from inlay.train.makers import create_riemannian_optimizer as create_riemannian_optimizer

__version__: str
