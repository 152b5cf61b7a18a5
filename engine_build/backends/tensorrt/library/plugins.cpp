// The kernels as a plugin library, for releases of TensorRT whose engines carry no compiled kernels: JetPack 6 has 10.3.
//
// The plugins are those of plugins.py, by name, inputs and outputs, so that one graph serves both: `w2a16`, `w4a16` and
// `w4a8`, each for one matrix, two (`w2a16_x2`) or three of one input, and `quantize_rows`. TensorRT finds them by
// `getCreators` when the library is loaded, times both cuts of a product as tactics, and writes into the engine what a
// plugin is; an engine is refused by a library that lays weights out otherwise.
//
// Kernels are PTX, which the CUDA driver fits to the GPU at a kernel's first launch. `constants.inc`, which the build
// writes, has their texts and the numbers that the packing and the kernels share.

#include <NvInfer.h>
#include <cuda.h>
#include <dlfcn.h>

#include <array>
#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

namespace
{
using namespace nvinfer1;

struct Family
{
    char const* name;
    int weight_bits, activation_bits;
};

struct Cut
{
    char const* name;
    int outputs, tokens, threads;
};

struct Text
{
    char const *name, *ptx;
};

#include "constants.inc"

ILoggerFinder* finder = nullptr;

void report(std::string const& text)
{
    if (ILogger* const logger = finder ? finder->findLogger() : nullptr)
        logger->log(ILogger::Severity::kERROR, (std::string(kNamespace) + " plugins: " + text).c_str());
}

// What is needed of the driver, which is where a GPU is and not where this is compiled.
class Driver
{
public:
    static Driver& get()
    {
        static Driver driver;
        return driver;
    }

    // Launches a kernel by its name; false, with a report, where it cannot be.
    bool launch(std::string const& name, int grid_x, int grid_y, int threads, void** arguments, cudaStream_t stream)
    {
        CUfunction const function = find(name);
        if (function == nullptr)
            return false;
        int const code
            = launch_kernel(function, grid_x, grid_y, 1, threads, 1, 1, 0, reinterpret_cast<CUstream>(stream), arguments, nullptr);
        if (code != CUDA_SUCCESS)
            report(name + ": the driver refuses its launch (CUresult " + std::to_string(code) + ")");
        return code == CUDA_SUCCESS;
    }

private:
    Driver()
    {
        void* const library = dlopen("libcuda.so.1", RTLD_NOW);
        auto const symbol = [library](auto& function, char const* name) {
            function = library ? reinterpret_cast<std::decay_t<decltype(function)>>(dlsym(library, name)) : nullptr;
        };
        symbol(load_module, "cuModuleLoadData");
        symbol(get_function, "cuModuleGetFunction");
        symbol(get_context, "cuCtxGetCurrent");
        symbol(launch_kernel, "cuLaunchKernel");
    }

    CUfunction find(std::string const& name)
    {
        if (!load_module || !get_function || !get_context || !launch_kernel)
        {
            report("libcuda.so.1 is missing or lacks what they need; install the GPU's driver");
            return nullptr;
        }
        CUcontext context = nullptr;
        get_context(&context);
        std::lock_guard<std::mutex> const lock(mutex);
        auto const place = std::make_pair(context, name);
        auto const known = functions.find(place);
        if (known != functions.end())
            return known->second;
        for (Text const& text : kTexts)
        {
            CUmodule module = nullptr;
            CUfunction function = nullptr;
            if (name != text.name)
                continue;
            int code = load_module(&module, text.ptx);
            if (code == CUDA_SUCCESS)
                code = get_function(&function, module, text.name);
            if (code != CUDA_SUCCESS)
                report(name + ": the driver cannot load it (CUresult " + std::to_string(code) + "); build the library for this GPU");
            return code == CUDA_SUCCESS ? functions[place] = function : nullptr;
        }
        report(name + ": no such kernel");
        return nullptr;
    }

    decltype(&cuModuleLoadData) load_module;
    decltype(&cuModuleGetFunction) get_function;
    decltype(&cuCtxGetCurrent) get_context;
    decltype(&cuLaunchKernel) launch_kernel;
    std::mutex mutex;
    std::map<std::pair<CUcontext, std::string>, CUfunction> functions;
};

int tokens_of(Dims const& x) { return int(x.d[0] * x.d[1]); }

int rounded_up(int64_t value, int whole) { return int((value + whole - 1) / whole); }

// Numbers that an engine keeps of a plugin.
class Fields
{
public:
    explicit Fields(std::vector<std::pair<char const*, int32_t>> const& named)
    {
        for (auto const& [name, value] : named)
        {
            values.push_back(value);
            names.push_back(name);
        }
        for (size_t place = 0; place < values.size(); ++place)
            fields.emplace_back(names[place], &values[place], PluginFieldType::kINT32, 1);
        collection = {int32_t(fields.size()), fields.data()};
    }

    Fields(Fields const&) = delete;
    Fields& operator=(Fields const&) = delete;

    // Whether an engine kept just these.
    bool equal(PluginFieldCollection const* kept) const
    {
        if (kept == nullptr || kept->nbFields != collection.nbFields)
            return false;
        for (size_t place = 0; place < values.size(); ++place)
        {
            bool found = false;
            for (int32_t other = 0; other < kept->nbFields; ++other)
                found |= std::strcmp(kept->fields[other].name, names[place]) == 0
                    && kept->fields[other].type == PluginFieldType::kINT32
                    && *static_cast<int32_t const*>(kept->fields[other].data) == values[place];
            if (!found)
                return false;
        }
        return true;
    }

    PluginFieldCollection collection{};

private:
    std::vector<char const*> names;
    std::vector<int32_t> values;
    std::vector<PluginField> fields;
};

// What both plugins have alike: linear tensors of given types, and no state but the tactic.
class Plugin : public IPluginV3, public IPluginV3OneCore, public IPluginV3OneBuild, public IPluginV3OneRuntime
{
public:
    Plugin(std::string name, std::vector<DataType> types, int outputs)
        : name(std::move(name)), types(std::move(types)), outputs(outputs)
    {
    }

    IPluginCapability* getCapabilityInterface(PluginCapabilityType type) noexcept override
    {
        if (type == PluginCapabilityType::kBUILD)
            return static_cast<IPluginV3OneBuild*>(this);
        if (type == PluginCapabilityType::kRUNTIME)
            return static_cast<IPluginV3OneRuntime*>(this);
        return static_cast<IPluginV3OneCore*>(this);
    }

    char const* getPluginName() const noexcept override { return name.c_str(); }
    char const* getPluginVersion() const noexcept override { return kVersion; }
    char const* getPluginNamespace() const noexcept override { return kNamespace; }
    int32_t getNbOutputs() const noexcept override { return outputs; }

    int32_t configurePlugin(
        DynamicPluginTensorDesc const*, int32_t, DynamicPluginTensorDesc const*, int32_t) noexcept override
    {
        return 0;
    }

    bool supportsFormatCombination(
        int32_t place, DynamicPluginTensorDesc const* tensors, int32_t, int32_t) noexcept override
    {
        return tensors[place].desc.format == TensorFormat::kLINEAR && tensors[place].desc.type == types[place];
    }

    int32_t getOutputDataTypes(DataType* results, int32_t count, DataType const*, int32_t inputs) const noexcept override
    {
        for (int32_t place = 0; place < count; ++place)
            results[place] = types[inputs + place];
        return 0;
    }

    int32_t onShapeChange(PluginTensorDesc const*, int32_t, PluginTensorDesc const*, int32_t) noexcept override
    {
        return 0;
    }

    IPluginV3* attachToContext(IPluginResourceContext*) noexcept override { return clone(); }
    PluginFieldCollection const* getFieldsToSerialize() noexcept override { return &fields().collection; }

    // What an engine keeps.
    virtual Fields const& fields() const = 0;

protected:
    std::string name;
    std::vector<DataType> types; // of inputs, then outputs
    int outputs;
};

// x [1, tokens, in] (of 8-bit activations: words, and a scale per token), codes and scales of every part -> y of each.
class Product : public Plugin
{
public:
    Product(Family const& family, int parts)
        : Plugin(name_of(family, parts), types_of(family, parts), parts), family(family), parts(parts)
    {
    }

    static std::string name_of(Family const& family, int parts)
    {
        return family.name + (parts > 1 ? "_x" + std::to_string(parts) : std::string());
    }

    IPluginV3* clone() noexcept override
    {
        auto* const copy = new Product(family, parts);
        copy->cut = cut;
        return copy;
    }

    Fields const& fields() const override
    {
        static std::map<std::string, Fields> all;
        static std::mutex mutex;
        std::lock_guard<std::mutex> const lock(mutex);
        std::vector<std::pair<char const*, int32_t>> const kept{{"weight_bits", family.weight_bits},
            {"activation_bits", family.activation_bits}, {"parts", parts}, {"layout", kLayout}};
        return all.try_emplace(name, kept).first->second;
    }

    int32_t getOutputShapes(DimsExprs const* inputs, int32_t, DimsExprs const*, int32_t, DimsExprs* results,
        int32_t count, IExprBuilder&) noexcept override
    {
        for (int32_t part = 0; part < count; ++part)
        {
            results[part].nbDims = 3;
            results[part].d[0] = inputs[0].d[0];
            results[part].d[1] = inputs[0].d[1];
            results[part].d[2] = inputs[given() + 2 * part].d[0];
        }
        return 0;
    }

    int32_t getNbTactics() noexcept override { return int32_t(std::size(kCuts)); }

    int32_t getValidTactics(int32_t* tactics, int32_t count) noexcept override
    {
        for (int32_t place = 0; place < count; ++place)
            tactics[place] = place + 1; // TensorRT keeps 0 for itself
        return 0;
    }

    int32_t setTactic(int32_t tactic) noexcept override
    {
        if (tactic < 0 || tactic > int32_t(std::size(kCuts)))
            return 1;
        cut = tactic == 0 ? 0 : tactic - 1;
        return 0;
    }

    int32_t enqueue(PluginTensorDesc const* described, PluginTensorDesc const*, void const* const* inputs,
        void* const* results, void*, cudaStream_t stream) noexcept override
    {
        Dims const &x = described[0].dims, &codes = described[given()].dims, &scales = described[given() + 1].dims;
        Cut const& chosen = kCuts[cut];
        int tokens = tokens_of(x), width = int(x.d[2]) * (family.activation_bits == 8 ? 4 : 1);
        int groups = int(scales.d[1]), blocks = 0;
        int const filled = int(codes.d[1]) * 32 / family.weight_bits;
        std::array<int, kMostParts> rows{};
        std::vector<void*> arguments;
        std::vector<void const*> addresses(inputs, inputs + given() + 2 * parts);
        addresses.insert(addresses.end(), results, results + parts);
        for (int place = 0; place < given() + 2 * parts; ++place)
            arguments.push_back(&addresses[place]);
        for (int* const number : {&tokens, &width, &groups})
            arguments.push_back(number);
        for (int part = 0; part < parts; ++part)
        {
            rows[part] = int(described[given() + 2 * part].dims.d[0]);
            blocks += rounded_up(rows[part], chosen.outputs);
            arguments.push_back(&rows[part]);
        }
        for (int part = 0; part < parts; ++part)
            arguments.push_back(&addresses[given() + 2 * parts + part]);
        std::string kernel = std::string(family.name) + "_" + chosen.name + "_"
            + (groups == 1 ? std::string("row") : "g" + std::to_string(filled / groups));
        if (parts > 1)
            kernel += "_x" + std::to_string(parts);
        int const columns = rounded_up(tokens, chosen.tokens);
        return Driver::get().launch(kernel, blocks, columns, chosen.threads, arguments.data(), stream) ? 0 : 1;
    }

private:
    static std::vector<DataType> types_of(Family const& family, int parts)
    {
        std::vector<DataType> types{DataType::kHALF};
        if (family.activation_bits == 8)
            types = {DataType::kINT32, DataType::kFLOAT};
        for (int part = 0; part < parts; ++part)
            types.insert(types.end(), {DataType::kINT32, DataType::kHALF});
        types.insert(types.end(), parts, DataType::kHALF);
        return types;
    }

    // Inputs before the matrices.
    int given() const { return family.activation_bits == 8 ? 2 : 1; }

    Family const& family;
    int parts, cut = 0;
};

// x [1, tokens, in] -> codes [1, tokens, words of whole runs], scales [1, tokens].
class QuantizeRows : public Plugin
{
public:
    QuantizeRows() : Plugin(kRounding, {DataType::kHALF, DataType::kINT32, DataType::kFLOAT}, 2) {}

    IPluginV3* clone() noexcept override { return new QuantizeRows; }

    Fields const& fields() const override
    {
        static Fields const kept({{"layout", kLayout}});
        return kept;
    }

    int32_t getOutputShapes(DimsExprs const* inputs, int32_t, DimsExprs const*, int32_t, DimsExprs* results, int32_t,
        IExprBuilder& builder) noexcept override
    {
        auto const& x = inputs[0];
        auto const* const runs = builder.operation(DimensionOperation::kCEIL_DIV, *x.d[2], *builder.constant(kRun));
        results[0].nbDims = 3;
        results[0].d[2] = builder.operation(DimensionOperation::kPROD, *runs, *builder.constant(kRun / 4));
        results[1].nbDims = 2;
        for (int output = 0; output < 2; ++output)
            for (int axis = 0; axis < 2; ++axis)
                results[output].d[axis] = x.d[axis];
        return 0;
    }

    int32_t enqueue(PluginTensorDesc const* described, PluginTensorDesc const*, void const* const* inputs,
        void* const* results, void*, cudaStream_t stream) noexcept override
    {
        int width = int(described[0].dims.d[2]);
        void const* x = inputs[0];
        void *codes = results[0], *scales = results[1];
        void* arguments[] = {&x, &width, &codes, &scales};
        int const tokens = tokens_of(described[0].dims);
        return Driver::get().launch(kRounding, tokens, 1, kRoundingThreads, arguments, stream) ? 0 : 1;
    }
};

// Makes the plugin of one name: for a graph, or out of an engine.
class Creator : public IPluginCreatorV3One
{
public:
    Creator(Family const* family, int parts)
        : family(family), parts(parts), name(family ? Product::name_of(*family, parts) : kRounding)
    {
    }

    IPluginV3* createPlugin(
        char const*, PluginFieldCollection const* kept, TensorRTPhase phase) noexcept override
    {
        Plugin* const plugin = family ? static_cast<Plugin*>(new Product(*family, parts)) : new QuantizeRows;
        if (phase == TensorRTPhase::kRUNTIME && !plugin->fields().equal(kept))
        {
            report(name + ": the engine was built with another version of this library; build it again");
            delete plugin;
            return nullptr;
        }
        return plugin;
    }

    PluginFieldCollection const* getFieldNames() noexcept override { return &none; }
    char const* getPluginName() const noexcept override { return name.c_str(); }
    char const* getPluginVersion() const noexcept override { return kVersion; }
    char const* getPluginNamespace() const noexcept override { return kNamespace; }

private:
    Family const* family;
    int parts;
    std::string name;
    PluginFieldCollection none{0, nullptr};
};
} // namespace

extern "C" __attribute__((visibility("default"))) void setLoggerFinder(ILoggerFinder* given) { finder = given; }

extern "C" __attribute__((visibility("default"))) IPluginCreatorInterface* const* getCreators(int32_t& count)
{
    static std::vector<IPluginCreatorInterface*> const creators = [] {
        std::vector<IPluginCreatorInterface*> all{new Creator(nullptr, 0)};
        for (Family const& family : kFamilies)
            for (int parts = 1; parts <= kMostParts; ++parts)
                all.push_back(new Creator(&family, parts));
        return all;
    }();
    count = int32_t(creators.size());
    return creators.data();
}
