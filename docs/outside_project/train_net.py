#!/usr/bin/env python
"""Your own detectron2 project, with a backbone of sasa_det: two lines are new, and numbered.

python train_net.py --config-file mask_rcnn.yaml --num-gpus 8
python train_net.py --config-file mask_rcnn.yaml --eval-only MODEL.WEIGHTS output/model_final.pth
"""

import sasa_det  # 1: before detectron2's imports

# isort: split
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.engine import DefaultTrainer, default_argument_parser, default_setup, launch
from detectron2.evaluation import COCOEvaluator


class Trainer(DefaultTrainer):
    @classmethod
    def build_evaluator(cls, cfg, dataset_name):
        return COCOEvaluator(dataset_name, output_dir=cfg.OUTPUT_DIR)


def main(args):
    cfg = get_cfg()
    sasa_det.add_sasa_config(cfg)  # 2: before the file is merged, which may set MODEL.SASA
    cfg.merge_from_file(args.config_file)
    cfg.merge_from_list(args.opts)
    cfg.freeze()
    default_setup(cfg, args)
    if args.eval_only:
        model = Trainer.build_model(cfg)
        DetectionCheckpointer(model).load(cfg.MODEL.WEIGHTS)
        return Trainer.test(cfg, model)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    return trainer.train()


if __name__ == "__main__":
    args = default_argument_parser().parse_args()
    launch(
        main,
        args.num_gpus,
        num_machines=args.num_machines,
        machine_rank=args.machine_rank,
        dist_url=args.dist_url,
        args=(args,),
    )
