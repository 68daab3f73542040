"""Every key of a run once, with its unit and its meaning; the values are the authors' recipe for VoxCeleb2.

Durations are given in epochs or in steps: exactly one of `X_epochs` and `X_steps` is set, the other is -1.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns the base config, which other configs change."""
    config = ConfigDict()
    config.seed = 0  # decides initialisation, order of the data, crops and augmentation
    # Model file or workdir whose networks the branches start from; a workdir's labels, too, if they are the same ones.
    config.init = ""

    # Length of the run, which the schedules of learning rate and teacher momentum span.
    config.total_epochs = 150.0
    config.total_steps = -1

    data = config.data = ConfigDict()
    data.train = ""  # dataset to train on, written by `memo-jax prepare`
    data.batch_size = 240  # utterances per step, over all devices and processes
    data.global_crops = 2  # global crops per utterance, seen by students and teachers; see teacher.view
    data.global_seconds = 4.0  # length of a global crop; a shorter utterance is repeated
    data.local_crops = 4  # local crops per utterance, seen by students only
    data.local_seconds = 2.0  # length of a local crop
    data.workers = 0  # processes that read and crop; 0: a thread of the training process

    augment = config.augment = ConfigDict()
    augment.clean = 1 / 6  # share of crops that stay clean
    augment.both = 1 / 3  # share of crops with reverberation and an added recording; the rest gets one kind
    augment.reverb_share = 0.25  # share of reverberation among the crops with one kind
    augment.noise = ""  # folder of noise, or all of MUSAN or RIRS_NOISES; "": no noise
    augment.music = ""  # folder of music, or all of MUSAN; "": no music
    augment.speech = ""  # folder of speech to add, or all of MUSAN; "": babble, see below
    augment.rirs = ""  # folder of room impulse responses, or all of RIRS_NOISES; "": no rooms
    augment.noise_snr_db = (0.0, 15.0)  # signal-to-noise ratio of noise: lowest and highest, uniform in between
    augment.music_snr_db = (5.0, 15.0)  # signal-to-noise ratio of music
    augment.speech_snr_db = (13.0, 20.0)  # signal-to-noise ratio of speech and babble
    augment.babble_from_batch = True  # without a folder of speech, add babble: other utterances of the batch
    augment.masked_bins = 0  # SpecAugment: widest band of mel bins, of 80, that each crop loses
    augment.bank_seconds = 6.0  # length of the rows that recordings of noise, music and speech are cut into
    augment.bank_megabytes = 512.0  # largest size of each bank on a device; larger banks are sampled
    augment.rir_seconds = 0.5  # length that room responses are cut to

    features = config.features = ConfigDict()
    # What networks take: log_mel (the authors'), wespeaker_fbank, kaldi_fbank (3D-Speaker's), speechbrain_fbank, or
    # sherpa_fbank, which alone lets an exported network run in sherpa-onnx.
    features.front_end = "log_mel"

    model = config.model = ConfigDict()
    model.branches = ("ecapa", "resnet")  # backbones that learn together: of ecapa, resnet, campplus
    model.embedding_dim = 256  # dimension of the embedding
    model.ecapa_channels = (512, 512, 512, 512, 1536)  # ECAPA-TDNN: stem, blocks, aggregation
    model.ecapa_scale = 8  # parts that a block's Res2 convolution splits its channels into, at least 2
    model.resnet_base_channels = 16  # channels of the ResNet's first stage; each stage doubles them
    model.resnet_blocks = (3, 4, 6, 3)  # residual blocks of each stage of the ResNet; these make a ResNet34
    model.resnet_stride = 1  # ResNet: stride of its first convolution, over time and frequency
    # ECAPA-TDNN, recomputed in the backward pass to save memory: none; norms: all but large convolutions; blocks: all.
    model.ecapa_remat = "none"
    model.resnet_remat = "none"  # ResNet, recomputed in the backward pass: none, norms or blocks, as above
    # Recompute the backbones' activations of all crop lengths but the last in the backward pass; False is faster.
    model.crop_remat = True
    model.resnet_packed = False  # ResNet on TPUs: pack neighbouring frequencies to fill the lanes
    model.resnet_scan = False  # ResNet on TPUs: loop over like blocks: compiles sooner, runs slower
    model.ecapa_stride = 1  # ECAPA-TDNN: stride of its first convolution; 2 halves a step's time
    model.ecapa_form = "speechbrain"  # variant of the ECAPA-TDNN: speechbrain (the authors') or wespeaker
    model.ecapa_embedding_norm = False  # ECAPA-TDNN: batch norm after the embedding, as in wespeaker's DINO
    model.campplus_layers = (12, 24, 16)  # CAM++: layers of each dense block
    model.campplus_growth = 32  # CAM++: channels that a layer adds
    model.campplus_channels = 128  # CAM++: channels of the first convolution over time
    model.campplus_plane_channels = 32  # CAM++: channels of the 2-D convolutions before it
    model.head_hidden = 2048  # projection head: width of its two hidden layers
    model.head_bottleneck = 256  # projection head: dimension of the vector compared with prototypes
    model.prototypes = 65536  # projection head: K, the number of prototypes
    model.shared_prototypes = False  # teachers use the students' prototypes instead of a moving average of them
    model.dtype = "float32"  # float32 or bfloat16; softmax, centres, norms and averages stay float32

    loss = config.loss = ConfigDict()
    loss.student_temp = 0.1  # temperature of the student softmax
    loss.center_momentum = 0.9  # decay per step of the running mean of the teacher logits
    loss.self = 1.0  # weight of self-distillation
    loss.cross = 1.0  # weight λ of cross-distillation; 0: branches learn independently
    loss.cross_head = "cross"  # head that cross-distillation uses: cross (its own) or self (one for both)
    loss.contrastive = 1 / 0.07  # weight w of the contrastive loss (NT-Xent) while the gate is open
    loss.contrastive_temperature = 0.1  # temperature of the contrastive loss
    loss.contrastive_margin = 0.0  # subtracted from the cosine of positives; above 0 the loss is AM-NT-Xent
    # For studies, reads labels: leave other utterances of an anchor's speaker out of its negatives.
    loss.contrastive_mask_same_speaker = False

    # What teachers' logits become: centered (softmax with a centre, as in DINO), or sinkhorn (balanced over the batch).
    loss.targets = "centered"
    loss.mean_entropy = 0.0  # weight of ln K minus the entropy of the mean student distribution, for each head
    loss.koleo = 0.0  # weight of KoLeo, which spreads embeddings, summed over views
    loss.variance = 0.0  # weight of VICReg's variance term on each head's projections
    loss.covariance = 0.0  # weight of VICReg's covariance term, likewise
    loss.regularizer_start = 0.25  # share of these two weights at the first step
    loss.regularizer_warmup_epochs = 10.0  # time over which they rise to their full values
    loss.regularizer_warmup_steps = -1

    supervised = config.supervised = ConfigDict()
    supervised.weight = 0.0  # weight of AAM-softmax on labels; reads them if above 0
    # Labels: table of lines `name label`, as `memo-jax cluster` writes it; "": the dataset's speakers.
    supervised.labels = ""
    supervised.scale = 30.0  # factor of the cosines
    supervised.margin = 0.2  # radians added to the angle between an embedding and its own speaker
    supervised.margin_warmup_epochs = 0.0  # time over which the margin rises from 0
    supervised.margin_warmup_steps = -1
    supervised.loss_gate_after_epochs = 0  # epochs after which utterances with a large loss are left out; 0: never
    # Epochs after which an utterance left out is trained on with the label that the student is sure of; 0: never.
    supervised.correct_labels_after_epochs = 0
    supervised.correction_temperature = 0.1  # temperature of the student's probabilities of labels
    supervised.correction_probability = 0.5  # probability above which the student is sure of a label

    gate = config.gate = ConfigDict()
    gate.rule = "plateau"  # when the contrastive loss stops: plateau, conflict, step, always (on), never (on)
    gate.smoothing = 0.99  # decay per step of the running means that the rules read
    gate.window_epochs = 1.0  # window over which plateau compares and for which conflict must last
    gate.window_steps = -1
    gate.min_epochs = 5.0  # shortest time for which plateau and conflict keep the gate open
    gate.min_steps = -1
    gate.min_improvement = 0.01  # plateau closes below this relative improvement over a window
    gate.min_alignment = 0.0  # conflict closes below this smoothed cosine of the two losses' gradients
    gate.stop_epochs = 50.0  # time at which the rule step closes the gate
    gate.stop_steps = -1

    optimizer = config.optimizer = ConfigDict()
    optimizer.name = "sgd"  # sgd (with coupled weight decay) or adamw (decoupled)
    optimizer.learning_rate = 0.2  # peak learning rate at a batch of 256; scaled by batch_size / 256
    optimizer.end_learning_rate = 1e-5  # learning rate at the end of its cosine; not scaled
    optimizer.warmup_epochs = 20.0  # linear warm-up of the learning rate from 0
    optimizer.warmup_steps = -1
    optimizer.sgd_momentum = 0.9  # momentum of sgd; adamw has its own
    optimizer.weight_decay = 5e-5  # weight decay, except for biases and other 1-D parameters
    optimizer.clip_norm = 3.0  # largest gradient norm of each single tensor; 0: no clipping
    optimizer.freeze_prototypes_epochs = 1.0  # time for which the prototypes stay frozen
    optimizer.freeze_prototypes_steps = -1

    teacher = config.teacher = ConfigDict()
    teacher.momentum = 0.996  # momentum of the moving average at the first step
    teacher.end_momentum = 1.0  # momentum at the last step, reached along a cosine
    # What teachers see: global (the students' global crops), or clean (global crops are for teachers only, without
    # augmentation, and students see local crops only).
    teacher.view = "global"
    teacher.temp = 0.04  # temperature of the teacher softmax in the first epoch
    teacher.end_temp = 0.07  # temperature after the warm-up
    teacher.temp_warmup_epochs = 30  # epochs over which the temperature rises linearly, changing once per epoch

    # Positives from other recordings: k-means of the teacher's embeddings, and teachers that see crops of a partner.
    # Speakers, where the dataset has them, are only read to report how many partners are of the same one.
    positives = config.positives = ConfigDict()
    positives.clusters = 0  # clusters of k-means, 25000 for VoxCeleb2; 0: teachers see crops of the utterance itself
    positives.from_epochs = 120.0  # time from which teachers see crops of a partner
    positives.from_steps = -1
    positives.every_epochs = 1.0  # interval at which partners are drawn
    positives.every_steps = -1
    positives.cluster = "nearest"  # whose members are drawn from: nearest (the nearest other cluster) or own
    positives.keep_own = 0.0  # share of utterances that keep their own recording
    positives.reference_seconds = 4.0  # length of the crop that an utterance is clustered by
    positives.iterations = 10  # iterations of k-means

    checkpoint = config.checkpoint = ConfigDict()
    checkpoint.every_epochs = 1.0  # interval between checkpoints
    checkpoint.every_steps = -1
    checkpoint.keep = 3  # number of latest checkpoints that are kept
    checkpoint.keep_every_epochs = 10.0  # checkpoints at multiples of this are never deleted; 0: none
    checkpoint.keep_every_steps = -1

    evaluation = config.evaluation = ConfigDict()
    evaluation.data = ""  # dataset with the recordings of the trials; "": no evaluation while training
    evaluation.trials = ""  # trial list
    evaluation.every_epochs = 5.0  # interval between evaluations; also at the first and the last step
    evaluation.every_steps = -1

    collapse = config.collapse = ConfigDict()
    collapse.patience_steps = 500  # a run stops once an indicator has been beyond its limit for this long
    collapse.min_entropy_gap = 0.001  # smallest distance of the teacher's entropy from ln K, a share of ln K
    collapse.min_mean_entropy = 0.01  # smallest entropy of the mean teacher distribution, a share of ln K
    collapse.min_embedding_std = 0.01  # smallest spread of the embeddings, a share of that of uniform ones

    config.log_every_steps = 10  # interval between rows of metrics.jsonl
    # From this size on, prototypes and optimiser states are sharded over the devices; 0: never.
    config.split_above_megabytes = 4.0
    return config
