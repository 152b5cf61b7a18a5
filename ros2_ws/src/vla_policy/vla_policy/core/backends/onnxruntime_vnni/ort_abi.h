// What a custom operator needs of ONNX Runtime's C interface, written out: its wheels bring no header.
//
// The interface only ever grows at its end, so a function's place in the table and the layout of the operator's structure
// at a version hold for every later release. Places were read off the public header and hold from 1.17 on.
#pragma once

#include <cstddef>
#include <cstdint>

namespace ort {

using Status = void; // null: success
struct Op;
struct Context;
struct Info;
struct Value;
struct Shape;
struct Domain;
struct Options;

enum ElementType : int { kFloat = 1, kUint8 = 2, kFloat16 = 10 };
enum Presence : int { kRequired = 0, kOptional = 1 };
constexpr uint32_t kVersion = 17;
constexpr int kInvalidArgument = 2;

// The table of functions, by place.
struct Api {
    void* functions[275];

    template <class Function>
    Function at(size_t place) const { return reinterpret_cast<Function>(functions[place]); }

    Status* error(char const* message) const
    {
        return at<Status* (*)(int, char const*)>(0)(kInvalidArgument, message);
    }
    Status* create_domain(char const* name, Domain** made) const
    {
        return at<Status* (*)(char const*, Domain**)>(26)(name, made);
    }
    Status* add_op(Domain* domain, Op const* op) const
    {
        return at<Status* (*)(Domain*, Op const*)>(27)(domain, op);
    }
    Status* add_domain(Options* options, Domain* domain) const
    {
        return at<Status* (*)(Options*, Domain*)>(28)(options, domain);
    }
    Status* attribute(Info const* info, char const* name, int64_t* value) const
    {
        return at<Status* (*)(Info const*, char const*, int64_t*)>(86)(info, name, value);
    }
    Status* input(Context const* context, size_t index, Value const** value) const
    {
        return at<Status* (*)(Context const*, size_t, Value const**)>(90)(context, index, value);
    }
    Status* output(Context* context, size_t index, int64_t const* sizes, size_t count, Value** value) const
    {
        return at<Status* (*)(Context*, size_t, int64_t const*, size_t, Value**)>(91)(context, index, sizes, count, value);
    }
    Status* data(Value const* value, void** content) const
    {
        return at<Status* (*)(Value const*, void**)>(51)(value, content);
    }
    Status* shape(Value const* value, Shape** made) const
    {
        return at<Status* (*)(Value const*, Shape**)>(65)(value, made);
    }
    Status* rank(Shape const* shape, size_t* count) const
    {
        return at<Status* (*)(Shape const*, size_t*)>(61)(shape, count);
    }
    Status* sizes(Shape const* shape, int64_t* values, size_t count) const
    {
        return at<Status* (*)(Shape const*, int64_t*, size_t)>(62)(shape, values, count);
    }
    void release(Shape* shape) const { at<void (*)(Shape*)>(99)(shape); }
    Status* parallel(Context const* context, void (*work)(void*, size_t), size_t count, void* argument) const
    {
        using Function = Status* (*)(Context const*, void (*)(void*, size_t), size_t, size_t, void*);
        return at<Function>(274)(context, work, count, 0, argument);
    }
};

struct ApiBase {
    Api const* (*get)(uint32_t version);
    char const* (*version)();
};

// An operator, as of version 17.
struct Op {
    uint32_t version;
    void* (*create)(Op const*, Api const*, Info const*);
    char const* (*name)(Op const*);
    char const* (*provider)(Op const*);
    int (*input_type)(Op const*, size_t);
    size_t (*inputs)(Op const*);
    int (*output_type)(Op const*, size_t);
    size_t (*outputs)(Op const*);
    void (*compute)(void*, Context*);
    void (*destroy)(void*);
    int (*input_presence)(Op const*, size_t);
    int (*output_presence)(Op const*, size_t);
    int (*input_memory)(Op const*, size_t);
    int (*variadic_input_least)(Op const*);
    int (*variadic_input_alike)(Op const*);
    int (*variadic_output_least)(Op const*);
    int (*variadic_output_alike)(Op const*);
    Status* (*create_or_fail)(Op const*, Api const*, Info const*, void**);
    Status* (*compute_or_fail)(void*, Context*);
    Status* (*infer_shape)(Op const*, void*);
    int (*first_version)(Op const*);
    int (*last_version)(Op const*);
    size_t (*may_inplace)(int**, int**);
    void (*release_inplace)(int*, int*);
    size_t (*aliases)(int**, int**);
    void (*release_aliases)(int*, int*);
};

// An operator made of `Kernel`: kName, kInputs, kOptional (the first input that may be left out), kOutputs, input_type,
// create and compute. Outputs are float32.
template <class Kernel>
constexpr Op op_of()
{
    return {
        .version = kVersion,
        .create = nullptr,
        .name = [](Op const*) { return Kernel::kName; },
        .provider = [](Op const*) -> char const* { return "CPUExecutionProvider"; },
        .input_type = [](Op const*, size_t index) { return Kernel::input_type(index); },
        .inputs = [](Op const*) { return Kernel::kInputs; },
        .output_type = [](Op const*, size_t) -> int { return kFloat; },
        .outputs = [](Op const*) { return Kernel::kOutputs; },
        .compute = nullptr,
        .destroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); },
        .input_presence = [](Op const*, size_t index) -> int { return index < Kernel::kOptional ? kRequired : kOptional; },
        .output_presence = [](Op const*, size_t) -> int { return kRequired; },
        .input_memory = [](Op const*, size_t) { return 0; },
        .variadic_input_least = [](Op const*) { return 1; },
        .variadic_input_alike = [](Op const*) { return 1; },
        .variadic_output_least = [](Op const*) { return 1; },
        .variadic_output_alike = [](Op const*) { return 1; },
        .create_or_fail = [](Op const*, Api const* api, Info const* info, void** made) {
            return Kernel::create(api, info, made);
        },
        .compute_or_fail = [](void* kernel, Context* context) { return static_cast<Kernel*>(kernel)->compute(context); },
        .infer_shape = nullptr,
        .first_version = [](Op const*) { return 1; },
        .last_version = [](Op const*) { return 1; },
        .may_inplace = nullptr,
        .release_inplace = nullptr,
        .aliases = nullptr,
        .release_aliases = nullptr,
    };
}

// Every piece of work, alone or on the session's threads.
template <class Work>
Status* run_pieces(Api const* api, Context const* context, bool alone, size_t pieces, Work& work)
{
    if (alone || pieces == 1) {
        for (size_t piece = 0; piece < pieces; ++piece)
            work(piece);
        return nullptr;
    }
    return api->parallel(context, [](void* what, size_t piece) { (*static_cast<Work*>(what))(piece); }, pieces, &work);
}

constexpr size_t kMostSizes = 8;

// The sizes of a tensor of 1 to `kMostSizes` dimensions; `rank` is 0 for any other.
inline Status* sizes_of(Api const* api, Value const* value, int64_t* sizes, size_t* rank)
{
    Shape* shape = nullptr;
    if (auto* failed = api->shape(value, &shape))
        return failed;
    Status* failed = api->rank(shape, rank);
    if (!failed && *rank > kMostSizes)
        *rank = 0;
    if (!failed && *rank)
        failed = api->sizes(shape, sizes, *rank);
    api->release(shape);
    return failed;
}

} // namespace ort
