// Does with the library what TensorRT does, against TensorRT's own headers: loads it, asks for its creators, makes every
// plugin for a graph, asks for types, formats and tactics, keeps its fields, makes it again out of them, and runs it.
#include <NvInfer.h>
#include <dlfcn.h>

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

using namespace nvinfer1;

struct Logger : ILogger
{
    void log(Severity, char const* text) noexcept override { std::printf("log %s\n", text); }
} logger;

struct Finder : ILoggerFinder
{
    ILogger* findLogger() override { return &logger; }
} finder;

template <typename Interface>
Interface* as(IPluginV3* plugin, PluginCapabilityType type)
{
    return static_cast<Interface*>(plugin->getCapabilityInterface(type));
}

// [rows, columns] or [1, rows, columns]
Dims sizes(std::vector<int64_t> const& all)
{
    Dims dims{};
    dims.nbDims = int(all.size());
    for (size_t axis = 0; axis < all.size(); ++axis)
        dims.d[axis] = all[axis];
    return dims;
}

int main(int, char** arguments)
{
    void* const library = dlopen(arguments[1], RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr)
        return std::printf("dlopen: %s\n", dlerror()), 1;
    auto const tokens = std::stoll(arguments[2]), inputs = std::stoll(arguments[3]), group = std::stoll(arguments[4]);
    reinterpret_cast<void (*)(ILoggerFinder*)>(dlsym(library, "setLoggerFinder"))(&finder);
    auto const creators = reinterpret_cast<IPluginCreatorInterface* const* (*)(int32_t&)>(dlsym(library, "getCreators"));
    int32_t count = 0;
    auto* const* const all = creators(count);
    for (int32_t place = 0; place < count; ++place)
    {
        if (std::strcmp(all[place]->getInterfaceInfo().kind, "PLUGIN CREATOR_V3ONE") != 0)
            return 1;
        auto* const creator = static_cast<IPluginCreatorV3One*>(all[place]);
        std::string const name = creator->getPluginName();
        IPluginV3* const made = creator->createPlugin("node", nullptr, TensorRTPhase::kBUILD);
        auto* const core = as<IPluginV3OneCore>(made, PluginCapabilityType::kCORE);
        auto* const build = as<IPluginV3OneBuild>(made, PluginCapabilityType::kBUILD);
        auto* const asked = as<IPluginV3OneRuntime>(made, PluginCapabilityType::kRUNTIME)->getFieldsToSerialize();
        std::printf("plugin %s %s %s fields", core->getPluginNamespace(), name.c_str(), core->getPluginVersion());
        for (int32_t field = 0; field < asked->nbFields; ++field)
            std::printf(" %s=%d", asked->fields[field].name, *static_cast<int32_t const*>(asked->fields[field].data));

        bool const rounding = name == "quantize_rows", rounded = name.rfind("w4a8", 0) == 0;
        int const parts = build->getNbOutputs(), tensors = rounding ? 1 : (rounded ? 2 : 1) + 2 * parts;
        int const bits = name[1] - '0';
        int64_t const filled = (inputs + 127) / 128 * 128;
        std::vector<DynamicPluginTensorDesc> described(tensors + parts);
        std::printf(" types");
        for (int tensor = 0; tensor < tensors + parts; ++tensor)
            for (DataType type : {DataType::kFLOAT, DataType::kHALF, DataType::kINT8, DataType::kINT32})
            {
                described[tensor].desc.type = type;
                described[tensor].desc.format = TensorFormat::kLINEAR;
                if (build->supportsFormatCombination(tensor, described.data(), tensors, parts))
                {
                    std::printf(" %d", int(type));
                    break;
                }
            }
        described[0].desc.format = TensorFormat::kCHW32;
        std::printf(" other %d", build->supportsFormatCombination(0, described.data(), tensors, parts));
        std::vector<DataType> given(tensors, DataType::kHALF), results(parts);
        build->getOutputDataTypes(results.data(), parts, given.data(), tensors);
        std::printf(" results");
        for (DataType type : results)
            std::printf(" %d", int(type));
        std::vector<int32_t> tactics(build->getNbTactics());
        build->getValidTactics(tactics.data(), int(tactics.size()));
        std::printf(" tactics %d\n", int(tactics.size()));

        std::vector<PluginTensorDesc> shapes(tensors);
        shapes[0].dims = sizes({1, tokens, rounded ? filled / 4 : inputs});
        if (rounded)
            shapes[1].dims = sizes({1, tokens});
        for (int part = 0; !rounding && part < parts; ++part)
        {
            int const first = (rounded ? 2 : 1) + 2 * part;
            int64_t const rows = 48 * (part + 1);
            shapes[first].dims = sizes({rows, filled * bits / 32});
            shapes[first + 1].dims = sizes({rows, group ? filled / group : 1});
        }
        std::vector<std::uintptr_t> addresses(tensors + parts);
        for (size_t tensor = 0; tensor < addresses.size(); ++tensor)
            addresses[tensor] = 100 + tensor;
        auto const* const from = reinterpret_cast<void const* const*>(addresses.data());
        auto* const to = reinterpret_cast<void* const*>(addresses.data() + tensors);
        IPluginV3* const kept = creator->createPlugin("node", asked, TensorRTPhase::kRUNTIME);
        if (kept == nullptr)
            return std::printf("%s: not made out of its own fields\n", name.c_str()), 1;
        if (tactics.empty())
            tactics.push_back(0);
        for (int32_t tactic : tactics)
        {
            auto* const attached = as<IPluginV3OneRuntime>(kept, PluginCapabilityType::kRUNTIME)->attachToContext(nullptr);
            auto* const runtime = as<IPluginV3OneRuntime>(attached, PluginCapabilityType::kRUNTIME);
            if (runtime->setTactic(tactic) != 0)
                return 1;
            IPluginV3* const copy = attached->clone(); // keeps the tactic
            auto* const run = as<IPluginV3OneRuntime>(copy, PluginCapabilityType::kRUNTIME);
            std::printf("enqueued %d\n", run->enqueue(shapes.data(), nullptr, from, to, nullptr, nullptr));
            delete copy;
            delete attached;
        }
        int32_t const other = 99;
        PluginField const changed{"layout", &other, PluginFieldType::kINT32, 1};
        PluginFieldCollection const foreign{1, &changed};
        std::printf("foreign %d\n", creator->createPlugin("node", &foreign, TensorRTPhase::kRUNTIME) != nullptr);
        delete kept;
        delete made;
    }
    return 0;
}
