"""diffusers: a backend of its attention dispatcher, pipelines compiled in one call, and pipelines calibrated step by step.

from sage_inductor.integrations import diffusers as sage

sage.compile(pipeline)                            # torch.compile(backend="sage_inductor") of what runs in steps

sage.register()                                   # or, without compiling the model
pipeline.transformer.set_attention_backend("sage_inductor")

found = sage.calibrate_pipeline(pipeline, tolerance=0.05, prompt="a cat", num_inference_steps=28)
print(found)                                      # what each step stands, and what the image loses
sage.compile(pipeline, plan=found)
"""

from sage_inductor.integrations.diffusers.calibrating import PipelineCalibration, calibrate_pipeline
from sage_inductor.integrations.diffusers.compiling import compile
from sage_inductor.integrations.diffusers.dispatch import register, unregister
from sage_inductor.integrations.diffusers.quality import OutputLoss

__all__ = [
    "OutputLoss",
    "PipelineCalibration",
    "calibrate_pipeline",
    "compile",
    "register",
    "unregister",
]
