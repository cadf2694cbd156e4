// swift-tools-version:5.7
// The same link flags for an app that takes its dependencies as Swift packages: add this package by
// its path (only packages added by path may have unsafe flags).
import Foundation
import PackageDescription

let lib = URL(fileURLWithPath: #filePath)
    .deletingLastPathComponent().deletingLastPathComponent()
    .appendingPathComponent("dist/lib").path

let package = Package(
    name: "LocalModels",
    platforms: [.iOS(.v16), .macCatalyst(.v16)],
    products: [.library(name: "LocalModels", targets: ["LocalModels"])],
    targets: [
        .target(
            name: "LocalModels",
            linkerSettings: [
                .unsafeFlags([
                    "-L\(lib)",
                    "-Xlinker", "-force_load", "-Xlinker", "\(lib)/libmodel_iphone.a",
                    "-Xlinker", "-force_load", "-Xlinker", "\(lib)/libtvm_runtime.a",
                    "-Xlinker", "-force_load", "-Xlinker", "\(lib)/libmlc_llm.a",
                ]),
                .linkedLibrary("tokenizers_cpp"),
                .linkedLibrary("sentencepiece"),
                .linkedLibrary("tokenizers_c"),
                .linkedLibrary("c++"),
                .linkedFramework("Foundation"),
                .linkedFramework("Metal"),
            ]
        )
    ]
)
