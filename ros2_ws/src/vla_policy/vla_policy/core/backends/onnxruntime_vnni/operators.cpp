// The operators of this library, as ONNX Runtime finds them.

#include "operators.h"

#include <initializer_list>

extern "C" ort::Status* RegisterCustomOps(ort::Options* options, ort::ApiBase const* base)
{
    ort::Api const* const api = base->get(ort::kVersion);
    static ort::Domain* domain = nullptr; // lives as long as the process: sessions refer to it
    if (!domain) {
        if (auto* failed = api->create_domain("vla_policy", &domain))
            return failed;
        for (auto const* op : {&kQuantizedLinear, &kCausalAttention})
            if (auto* failed = api->add_op(domain, op))
                return failed;
    }
    return api->add_domain(options, domain);
}
