"""xfuser's pipeline classes, by their modules: a call of any of them is told to the cache."""

from __future__ import annotations

# Of a transformer that xfuser wraps.
WRAPPERS = {
    "pipeline_flux": "xFuserFluxPipeline",
    "pipeline_flux_control": "xFuserPipelineFluxControlPipeline",
    "pipeline_flux2": "xFuserFlux2PipelineBase",
    "pipeline_stable_diffusion_3": "xFuserStableDiffusion3Pipeline",
    "pipeline_cogvideox": "xFuserCogVideoXPipeline",
    "pipeline_consisid": "xFuserConsisIDPipeline",
    "pipeline_hunyuandit": "xFuserHunyuanDiTPipeline",
    "pipeline_latte": "xFuserLattePipeline",
    "pipeline_lumina2": "xFuserLumina2Pipeline",
    "pipeline_pixart_alpha": "xFuserPixArtAlphaPipeline",
    "pipeline_pixart_sigma": "xFuserPixArtSigmaPipeline",
    "pipeline_sana": "xFuserSanaPipeline",
    "pipeline_sana_sprint": "xFuserSanaSprintPipeline",
}
# diffusers' own, made to share guidance out: no rank is given what the others are.
SHARING = {
    "pipeline_wan_i2v": "xFuserWanImageToVideoPipeline",
    "pipeline_qwen_image_edit": "xFuserQwenImageEditPipeline",
}
