// A stand-in for libcuda.so.1: it tells every module that is loaded and every kernel that is launched.
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <string>

extern "C"
{
    int cuCtxGetCurrent(void** context)
    {
        *context = reinterpret_cast<void*>(1);
        return 0;
    }

    int cuModuleLoadData(void** module, void const* image)
    {
        *module = const_cast<void*>(image);
        return std::strstr(static_cast<char const*>(image), ".entry") ? 0 : 218;
    }

    int cuModuleGetFunction(void** function, void* module, char const* name)
    {
        *function = new std::string(name);
        return std::strstr(static_cast<char const*>(module), name) ? 0 : 500;
    }

    // Addresses are written as names of tensors: the driver gives address 100 + place to each.
    int cuLaunchKernel(void* function, unsigned x, unsigned y, unsigned, unsigned threads, unsigned, unsigned,
        unsigned shared, void*, void** arguments, void**)
    {
        std::string const& name = *static_cast<std::string*>(function);
        bool const rounding = name == "quantize_rows";
        int const parts = name.find("_x3") != std::string::npos ? 3 : name.find("_x2") != std::string::npos ? 2 : 1;
        int const tensors = rounding ? 1 : (name.find("w4a8") == 0 ? 2 : 1) + 2 * parts;
        int const numbers = rounding ? 1 : 3 + parts, results = rounding ? 2 : parts;
        std::printf("launch %s %u %u %u %u", name.c_str(), x, y, threads, shared);
        for (int place = 0; place < tensors + numbers + results; ++place)
            if (place >= tensors && place < tensors + numbers)
                std::printf(" %d", *static_cast<int*>(arguments[place]));
            else
                std::printf(" @%d", int(*static_cast<std::uintptr_t*>(arguments[place])));
        std::printf("\n");
        return 0;
    }
}
