// swift-tools-version: 6.0
import PackageDescription

let package = Package(
    name: "MM1Kit",
    platforms: [.macOS(.v14), .iOS(.v17)],
    products: [
        .library(name: "MM1Kit", targets: ["MM1Kit"]),
        .executable(name: "mm1-ask", targets: ["mm1-ask"]),
    ],
    targets: [
        .target(name: "MM1Kit"),
        .executableTarget(name: "mm1-ask", dependencies: ["MM1Kit"]),
        .testTarget(
            name: "MM1KitTests", dependencies: ["MM1Kit", "mm1-ask"],
            exclude: ["encoder.json"]),
    ]
)
