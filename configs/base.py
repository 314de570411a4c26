"""Every option, once: its default, its type, its unit and what it does. Other configs state differences."""

from maskdit_jax.config import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0  # of initialisation, data order and every random draw of training
    config.init_from = ""  # run folder whose weights the run starts from, with a fresh optimizer

    config.vae = ""  # the latents' autoencoder, to show samples as pixels: diffusers folder or .pth file

    config.model = model = ConfigDict()
    model.size = "XL/2"  # S, B, L, XL or H / patch size; fills the four numbers below that are 0
    model.hidden_size = 0  # width of the encoder; 0: from `size`
    model.depth = 0  # blocks of the encoder; 0: from `size`
    model.num_heads = 0  # attention heads of the encoder; 0: from `size`
    model.patch_size = 0  # latent pixels per side of a patch; 0: from `size`
    model.image_size = 32  # height and width of the latents, in latent pixels
    model.channels = 4  # channels of the latents
    model.num_classes = 1000  # 0: unconditional
    model.use_decoder = True  # False: a plain DiT, without reconstruction
    model.decoder_hidden_size = 512  # width of the decoder
    model.decoder_depth = 8  # blocks of the decoder
    model.decoder_num_heads = 16  # attention heads of the decoder
    model.precision = "bfloat16"  # of compute: bfloat16, tf32 or float32; parameters are float32
    model.remat = "none"  # recompute in the backward pass: none, mlp (fc1 and GELU) or full
    model.unroll = "auto"  # unroll the loop over blocks: full, none or auto (full on a GPU)

    config.diffusion = diffusion = ConfigDict()
    diffusion.sigma_data = 0.5  # standard deviation of the latents that the preconditioning assumes
    diffusion.P_mean = -1.2  # mean of ln(sigma) in training
    diffusion.P_std = 1.2  # standard deviation of ln(sigma) in training
    diffusion.mae_coef = 0.1  # weight of the reconstruction of hidden patches; 0: no mask token
    diffusion.label_dropout = 0.1  # share of the labels replaced by "no class"
    diffusion.mask_ratio = 0.5  # share of the patches hidden at the start of training
    diffusion.mask_ratio_min = 0.0  # the other end of a schedule that is not constant
    diffusion.mask_schedule = "constant"  # constant, linear, exp or cosine2 … cosine6
    diffusion.mask_schedule_steps = 0  # updates from one end of the schedule to the other; 0: the run's

    config.data = data = ConfigDict()
    data.source = ""  # digits, latents:FOLDER, folder:PATH or tfds:NAME
    data.space = "latents"  # what the model sees: latents, or pixels in [-1, 1]
    data.latent_scale = 0.18215  # latents = latent_scale · autoencoder output; only for cached moments
    data.num_threads = 4  # reading threads of each process; 1 is fastest for latents in the page cache
    data.flip = False  # mirror half of the images of folder: and tfds:
    data.max_zoom = 1.0  # random short side of 1 … max_zoom · image_size, random crop; 1: centre crop

    config.training = training = ConfigDict()
    training.num_steps = 2_000_000  # optimizer updates
    training.batch_size = 1024  # items per update, over all devices and processes
    training.accumulate = 1  # microbatches a batch is cut into, one after the other, to save memory
    training.ema_decay = 0.9999  # per update
    training.max_nonfinite_steps = 100  # stop after so many skipped updates in a row

    config.optimizer = optimizer = ConfigDict()
    optimizer.learning_rate = 1e-4  # after the warm-up
    optimizer.warmup_kimg = 0.0  # linear warm-up, in thousands of items
    optimizer.b1 = 0.9  # AdamW
    optimizer.b2 = 0.999  # AdamW
    optimizer.eps = 1e-8  # AdamW
    optimizer.weight_decay = 0.0  # AdamW, on every parameter
    optimizer.clip_norm = 0.0  # largest global norm of the gradient; 0: no clipping

    config.mesh = mesh = ConfigDict()
    mesh.data = 0  # devices along the data axis; 0: all that `fsdp` leaves
    mesh.fsdp = 1  # devices that share the parameters, EMA and optimizer state

    config.checkpoint = checkpoint = ConfigDict()
    checkpoint.every_steps = 5_000  # updates between checkpoints
    checkpoint.keep = 3  # newest checkpoints kept
    checkpoint.keep_every_steps = 0  # checkpoints of every so many updates are kept for good; 0: none

    config.report = report = ConfigDict()
    report.every_steps = 100  # updates between progress lines
    report.tensorboard = True  # write scalars and sample grids for TensorBoard
    report.preview_steps = 50_000  # updates between sample grids; 0: only at the end
    report.preview_rows = 10  # rows of the grid: the first classes
    report.preview_columns = 10  # columns of the grid: samples of each class

    config.sampling = sampling = ConfigDict()  # defaults of previews and `sample`
    sampling.num_steps = 40  # noise levels; Heun calls the network 2·num_steps - 1 times
    sampling.solver = "heun"  # heun or euler
    sampling.cfg_scale = 1.5  # guidance; 1: none
    sampling.sigma_min = 0.002
    sampling.sigma_max = 80.0
    sampling.rho = 7.0
    sampling.S_churn = 0.0  # EDM's stochastic sampler; 0: deterministic
    sampling.S_min = 0.0
    sampling.S_max = 1e9
    sampling.S_noise = 1.0

    config.evaluation = evaluation = ConfigDict()
    evaluation.num_samples = 0  # samples of the card at the end of training; 0: no card
    return config.lock()
