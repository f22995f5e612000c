// placement.c - see placement.h.
#include "placement.h"

#define SPARE_MOST ((uint64_t) 512 << 20) // left free for the driver and the back end's own buffers
#define SPARE_PART 8                      // but at most this part of what is free

static uint64_t less(uint64_t a, uint64_t b) { return a > b ? a - b : 0; }

static uint64_t usable(uint64_t free) {
    const uint64_t part = free / SPARE_PART;
    return free - (part < SPARE_MOST ? part : SPARE_MOST);
}

// Computes the room for weights on each device, and places the tower.
static void room_of(placement * p, const placement_sizes * sizes, const placement_wish * wish,
                    uint64_t * room) {
    for (int32_t d = 0; d < p->devices.n; d++) room[d] = less(usable(wish->free[d]), sizes->compute);
    p->vision = wish->vision;
    const int32_t d = wish->vision == VISION_AUTO ? wish->main_gpu : wish->vision;
    if (d < 0 || d >= p->devices.n) {
        p->vision = ON_HOST;
        return;
    }
    const uint64_t larger = less(sizes->compute_vision, sizes->compute); // one buffer serves both graphs
    const bool fits = less(usable(wish->free[d]), sizes->compute_vision) >= sizes->vision;
    p->vision = wish->vision != VISION_AUTO || fits ? d : ON_HOST;
    if (p->vision == d) room[d] = less(room[d], sizes->vision + larger);
}

// Puts the last n of the layers and the output (n = n_layer + 1: all) on the devices, in shares; false if one
// of them cannot hold its share.
static bool place(placement * p, const placement_sizes * sizes, int32_t n, const double * shares,
                  const uint64_t * room, int32_t n_devices) {
    const int32_t n_layer = sizes->n_layer, n_placed = n > n_layer ? n_layer : n;
    uint64_t used[MAX_DEVICES] = { 0 };
    bool fits = true;
    int32_t d = 0;
    for (int32_t i = 0; i < n_layer; i++) p->layers[i] = ON_HOST;
    for (int32_t i = n_layer - n_placed, j = 0; j < n; i++, j++) {
        while (d < n_devices - 1 && shares[d] * n < j + 0.5) d++;
        if (i < n_layer) p->layers[i] = d;
        used[d] += i < n_layer ? sizes->layers[i] : sizes->output;
        fits = fits && used[d] <= room[d];
    }
    p->output = n > n_layer ? d : ON_HOST;
    return fits;
}

void placement_plan(placement * p, const placement_sizes * sizes, const placement_wish * wish,
                    int32_t n_for_layers) {
    uint64_t room[MAX_DEVICES] = { 0 };
    double shares[MAX_DEVICES] = { 0 }, sum = 0; // shares: of this device and those before it
    float given = 0;
    p->n_layer = sizes->n_layer;
    p->n_for_layers = n_for_layers;
    room_of(p, sizes, wish, room);
    for (int32_t d = 0; d < n_for_layers; d++) given += wish->split[d];
    for (int32_t d = 0; d < n_for_layers; d++)
        shares[d] = sum += given > 0 ? (double) wish->split[d] : (double) room[d];
    for (int32_t d = 0; d < n_for_layers; d++)
        shares[d] = sum > 0 ? shares[d] / sum : (d + 1.0) / n_for_layers;
    const int32_t all = sizes->n_layer + 1;
    const bool fixed = wish->n_gpu_layers >= 0;
    int32_t n = fixed && wish->n_gpu_layers < all ? wish->n_gpu_layers : all;
    if (n_for_layers == 0) n = 0;
    while (!place(p, sizes, n, shares, room, n_for_layers) && !fixed && n > 0) n--;
}

int32_t placement_n_gpu_layers(const placement * p) {
    int32_t n = p->output != ON_HOST;
    for (int32_t i = 0; i < p->n_layer; i++) n += p->layers[i] != ON_HOST;
    return n;
}

ggml_backend_dev_t placement_device(const placement * p, int32_t place) {
    return place == ON_HOST ? NULL : p->devices.items[place];
}

bool placement_is_on_first(const placement * p) {
    bool is_there = p->devices.n > 0 && p->output == 0 && !p->kv_on_host;
    for (int32_t i = 0; i < p->n_layer; i++) is_there = is_there && p->layers[i] == 0;
    return is_there;
}
