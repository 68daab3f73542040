"""Every key of a run once, with its unit and its meaning; the values are the authors' recipe for VoxCeleb2.

Durations are given in epochs or in steps: exactly one of `X_epochs` and `X_steps` is set, the other is -1.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns the base config, which other configs change."""
    config = ConfigDict()
    config.seed = 0  # initialisation, order of the data, crops and augmentation
    config.init = ""  # model file whose network the branch of its kind starts from; "" starts from random weights

    # How long. The schedules of learning rate and teacher momentum span exactly this.
    config.total_epochs = 150.0
    config.total_steps = -1

    data = config.data = ConfigDict()
    data.train = ""  # dataset written by `memo-jax prepare`
    data.batch_size = 240  # utterances a step, over all devices and processes
    data.global_crops = 2  # views that students and teachers see
    data.global_seconds = 4.0  # length of a global crop; a shorter utterance is repeated
    data.local_crops = 4  # views that only students see
    data.local_seconds = 2.0  # length of a local crop
    data.workers = 0  # processes that read and crop; 0 reads in a thread of the training process

    augment = config.augment = ConfigDict()
    augment.clean = 1 / 6  # share of crops left as they are
    augment.both = 1 / 3  # share of crops with reverberation and an added recording; the rest gets one kind
    augment.reverb_share = 0.25  # share of reverberation among the crops with one kind
    augment.noise = ""  # folder of noises, or all of MUSAN or RIRS_NOISES; "" leaves the kind out, as below
    augment.music = ""  # folder of music, or all of MUSAN
    augment.speech = ""  # folder of speech to add, or all of MUSAN; without it other utterances of the batch are added
    augment.rirs = ""  # folder of room impulse responses, or all of RIRS_NOISES
    augment.noise_snr_db = (0.0, 15.0)  # lowest and highest signal-to-noise ratio, uniform between, dB
    augment.music_snr_db = (5.0, 15.0)  # the same for music
    augment.speech_snr_db = (13.0, 20.0)  # the same for speech and babble
    augment.babble_from_batch = True  # add other utterances of the batch where no speech folder is given
    augment.masked_bins = 0  # most neighbouring mel bins that each crop loses, of 80
    augment.bank_seconds = 6.0  # length of a row of a bank of recordings
    augment.bank_megabytes = 512.0  # most memory of each bank on a device; of more, a seeded choice
    augment.rir_seconds = 0.5  # room responses are cut there

    model = config.model = ConfigDict()
    model.branches = ("ecapa", "resnet")  # of ecapa, resnet, campplus, those that learn together; one is plain DINO
    model.embedding_dim = 256  # numbers in an embedding
    model.ecapa_channels = (512, 512, 512, 512, 1536)  # of the stem, the three blocks (multiples of 8), their summary
    model.resnet_base_channels = 16  # of the first stage; each further one has twice as many
    model.resnet_blocks = (3, 4, 6, 3)  # residual blocks of each stage; these make a ResNet34
    model.ecapa_remat = "none"  # what the backward pass recomputes: none; norms: all but large convolutions; blocks
    model.resnet_remat = "none"  # the same of the ResNet
    model.resnet_packed = False  # for TPUs: neighbouring frequencies side by side fill their lanes; rounding differs
    model.resnet_scan = False  # for TPUs: a loop over the blocks of a stage that are alike compiles sooner
    model.ecapa_stride = 1  # frames that its first convolution moves on by; 2 takes half the time
    model.ecapa_form = "speechbrain"  # whose ECAPA-TDNN: speechbrain (and the authors) or wespeaker
    model.ecapa_embedding_norm = False  # a batch norm after its embedding, which wespeaker has for self-supervision
    model.campplus_layers = (12, 24, 16)  # layers of each dense block of a CAM++
    model.campplus_growth = 32  # channels that each of them adds; inside, it has four times as many
    model.campplus_channels = 128  # of its first convolution over time
    model.campplus_plane_channels = 32  # of the convolutions over time and frequency before it
    model.head_hidden = 2048  # width of the two hidden layers of a projection head
    model.head_bottleneck = 256  # width of the unit vector that is compared with the prototypes
    model.prototypes = 65536  # K, the outputs of a head
    model.dtype = "float32"  # compute in float32 or bfloat16; softmaxes, centres, norms and averages stay float32

    loss = config.loss = ConfigDict()
    loss.student_temp = 0.1  # temperature of the student softmax
    loss.center_momentum = 0.9  # decay per step of the running mean of the teacher logits
    loss.self = 1.0  # weight of the self-distillation
    loss.cross = 1.0  # weight λ of the cross-distillation; 0 makes the branches strangers
    loss.cross_head = "cross"  # "cross": a head of its own for cross-distillation; "self": one head for both
    loss.contrastive = 1 / 0.07  # weight of NT-Xent on the embeddings while the gate is open
    loss.contrastive_temperature = 0.1  # of NT-Xent
    loss.contrastive_margin = 0.0  # taken off the cosine of a positive pair: above 0 the loss is AM-NT-Xent

    gate = config.gate = ConfigDict()
    gate.rule = "plateau"  # when contrastive learning stops: plateau, conflict, step, always (on), never (on)
    gate.smoothing = 0.99  # decay of the running means, per step
    gate.window_epochs = 1.0  # plateau compares over it, conflict must last for it
    gate.window_steps = -1
    gate.min_epochs = 5.0  # plateau and conflict keep the gate open at least that long
    gate.min_steps = -1
    gate.min_improvement = 0.01  # plateau: relative improvement of the smoothed loss over a window
    gate.min_alignment = 0.0  # conflict: smoothed cosine between the two losses' gradients at the embedding
    gate.stop_epochs = 50.0  # step: contrastive learning stops there
    gate.stop_steps = -1

    optimizer = config.optimizer = ConfigDict()
    optimizer.name = "sgd"  # sgd (coupled weight decay) or adamw (decoupled)
    optimizer.learning_rate = 0.2  # at a batch of 256; scaled by batch_size / 256
    optimizer.end_learning_rate = 1e-5  # not scaled
    optimizer.warmup_epochs = 20.0  # linear from 0
    optimizer.warmup_steps = -1
    optimizer.sgd_momentum = 0.9  # of sgd; adamw has its own
    optimizer.weight_decay = 5e-5  # not on biases and other 1-D parameters
    optimizer.clip_norm = 3.0  # largest norm of the gradient of each single tensor; 0 does not clip
    optimizer.freeze_prototypes_epochs = 1.0  # the prototypes start to learn after it
    optimizer.freeze_prototypes_steps = -1

    teacher = config.teacher = ConfigDict()
    teacher.momentum = 0.996  # at the first step; a cosine leads it to …
    teacher.end_momentum = 1.0  # … this at the last
    teacher.temp = 0.04  # in the first epoch; it rises by epochs to …
    teacher.end_temp = 0.07  # … this,
    teacher.temp_warmup_epochs = 30  # … in this many epochs

    checkpoint = config.checkpoint = ConfigDict()
    checkpoint.every_epochs = 1.0  # how often one is saved
    checkpoint.every_steps = -1
    checkpoint.keep = 3  # latest checkpoints that stay
    checkpoint.keep_every_epochs = 10.0  # checkpoints at multiples of it stay for ever; 0 for none
    checkpoint.keep_every_steps = -1

    evaluation = config.evaluation = ConfigDict()
    evaluation.data = ""  # dataset of the trials' recordings; "" evaluates nothing while training
    evaluation.trials = ""  # trial list, in VoxCeleb or Kaldi form
    evaluation.every_epochs = 5.0  # how often the EER is measured, besides before the first step and after the last
    evaluation.every_steps = -1

    collapse = config.collapse = ConfigDict()
    collapse.patience_steps = 500  # a run stops when an indicator has been beyond its limit for so many steps
    collapse.min_entropy_gap = 0.001  # of ln K: the teacher's mean entropy may not come closer to uniform
    collapse.min_mean_entropy = 0.01  # of ln K: the entropy of the teacher's mean distribution may not be below
    collapse.min_embedding_std = 0.01  # of the spread of uniform embeddings

    config.log_every_steps = 10  # rows of metrics.jsonl
    # Prototypes and what the optimiser keeps of a parameter are split over the devices from this size on; 0: never.
    config.split_above_megabytes = 4.0
    return config
