// model.h - a language model and, optionally, its vision tower and projector.
#pragma once

#include "cores.h"
#include "language.h"
#include "placement.h"
#include "tokenizer.h"
#include "vision.h"

struct pyllava_model {
    logger log;
    weights text_weights, vision_weights;
    placement placement;
    language language;
    vocab vocab;
    tokenizer tokenizer; // over vocab
    bool has_vision;
    vision vision;
    cores * cores; // shared by its sessions
};

pyllava_status model_load(const pyllava_model_params * params, pyllava_model ** out);
pyllava_status model_plan(const pyllava_model_params * params, pyllava_model_devices * out);
void model_free(pyllava_model * model);
void model_describe(const pyllava_model * model, pyllava_model_info * out);
void model_devices(const pyllava_model * model, pyllava_model_devices * out);
